"""The loss of points, with the auxiliary term of the low-resolution prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OccupancyLoss(nn.Module):
    """Cross-entropy of points plus ``coarse_weight`` times that of the auxiliary low-resolution logits.

    Reich et al., BMVC 2021 (arXiv 2110.10640), section 3: binary cross-entropy and 0.1. With more than one logit both
    are softmax cross-entropies; a coarse cell that holds any foreground counts as the most frequent foreground label in
    it, which for one structure is the published max-pooled label.

    Args:
        point_loss: takes the place of the first term: any loss of logits (B, K, N) and labels (B, 1, N), such as
            MONAI's ``DiceCELoss(to_onehot_y=True, softmax=True)``.
        coarse_weight: of the second term.
        ignore_index: label of voxels that count nowhere; points must not be drawn there.
    """

    def __init__(
        self, point_loss: nn.Module | None = None, coarse_weight: float = 0.1, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.point_loss = point_loss
        self.coarse_weight = coarse_weight
        self.ignore_index = ignore_index

    def forward(self, pred: tuple[Tensor, Tensor | None], target: tuple[Tensor, Tensor]) -> Tensor:
        """The loss, one number.

        Args:
            pred: logits (B, N, K) of the points, and auxiliary logits (B, K, h, w, d) or None.
            target: labels (B, N) of the points, and the label volume (B, 1, H, W, D).
        """
        logits, coarse = pred
        values, label = target
        loss = self._of_points(logits.transpose(1, 2).float(), values)
        if coarse is None or self.coarse_weight == 0:
            return loss
        aim = coarse_label(label, coarse.shape[2:], coarse.shape[1], self.ignore_index)
        return loss + self.coarse_weight * _cross_entropy(coarse.float(), aim)

    def _of_points(self, logits: Tensor, values: Tensor) -> Tensor:
        if self.point_loss is None:
            return _cross_entropy(logits, values.long())
        return self.point_loss(logits, values[:, None])


def coarse_label(label: Tensor, shape: torch.Size | tuple[int, ...], channels: int, ignore_index: int | None) -> Tensor:
    """What the low-resolution logits shall say.

    Args:
        label: (B, 1, H, W, D) whole numbers, background 0.
        shape: extents (h, w, d) of the coarse grid.
        channels: logits K; with 1 every label above 0 is foreground.
        ignore_index: label of voxels that do not count.

    Returns:
        (B, h, w, d) int64: 0 where a cell has no foreground, else its most frequent foreground label.
    """
    volume = label.as_subclass(Tensor)
    if channels == 1:
        foreground = volume > 0 if ignore_index is None else (volume > 0) & (volume != ignore_index)
        return F.adaptive_max_pool3d(foreground.float(), tuple(shape))[:, 0].long()
    fractions = [F.adaptive_avg_pool3d((volume == c).float(), tuple(shape))[:, 0] for c in range(1, channels)]
    most, which = torch.stack(fractions).max(0)
    return torch.where(most > 0, which + 1, 0)


def _cross_entropy(logits: Tensor, values: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], (values > 0).to(logits.dtype))
    return F.cross_entropy(logits, values)

"""The loss of points, with the auxiliary term of the low-resolution prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.arguments import check_number, numbers_checked
from monai_memeff.checks import check_labels
from monai_memeff.errors import InputError


class OccupancyLoss(nn.Module):
    """Cross-entropy of points plus ``coarse_weight`` times that of the auxiliary low-resolution logits.

    Reich et al., BMVC 2021 (arXiv 2110.10640), section 3: binary cross-entropy and 0.1. With more than one logit both
    are softmax cross-entropies of the labels 0 ... K - 1, with one those of 0 and 1; a coarse cell that holds any
    foreground counts as the most frequent foreground label in it, which for one structure is the published max-pooled
    label.

    Args:
        point_loss: takes the place of the first term: any loss of logits (B, K, N) and labels (B, 1, N), such as
            MONAI's ``DiceCELoss(to_onehot_y=True, softmax=True)``.
        coarse_weight: Weight of the second term.
        ignore_index: label of voxels without annotation. Their points do not count, nor do coarse cells that hold them
            and no foreground; where nothing at all counts, the loss is 0 and so is every gradient. A ``point_loss``
            sees no volume without annotated points. Points of ignored voxels beside others it must leave out itself
            (and say so in an attribute ``ignore_index`` or ``ignore_label``), so draw none:
            :class:`~monai_memeff.occupancy.RandOccupancyPoints` takes ``ignore_index`` too.

    Raises:
        ValueError: coarse_weight below 0.

    Examples:
        >>> logits, coarse = torch.zeros(1, 8, 1), torch.zeros(1, 1, 2, 2, 2)
        >>> label = torch.ones(1, 1, 8, 8, 8)
        >>> OccupancyLoss(coarse_weight=0.1)((logits, coarse), (torch.ones(1, 8), label))  # 1.1 ln 2
        tensor(0.7625)
    """

    @numbers_checked
    def __init__(
        self, point_loss: nn.Module | None = None, coarse_weight: float = 0.1, ignore_index: int | None = None
    ) -> None:
        super().__init__()
        self.point_loss = point_loss
        check_number("coarse_weight", coarse_weight, least=0)
        self.coarse_weight = coarse_weight
        self.ignore_index = ignore_index

    def forward(self, pred: tuple[Tensor, Tensor | None], target: tuple[Tensor, Tensor]) -> Tensor:
        """The loss, one number.

        Args:
            pred: logits (B, N, K) of the points, and auxiliary logits (B, K, h, w, d) or None.
            target: labels (B, N) of the points, and the label volume (B, 1, H, W, D).

        Raises:
            InputError: labels that are none of the classes, in points or volume, or points of ignored voxels for a
                ``point_loss`` that would take them for a class.
        """
        logits, coarse = pred
        values, label = target
        for labels in (values, label):  # a coarse cell or a point of another label would count as background
            known = labels if self.ignore_index is None else labels[labels != self.ignore_index]
            check_labels(known, "OccupancyLoss", max(logits.shape[2], 2))
        loss = self._of_points(logits.transpose(1, 2).float(), values)
        if coarse is None or self.coarse_weight == 0:
            return loss
        aim = coarse_label(label, coarse.shape[2:], coarse.shape[1], self.ignore_index)
        annotated = None if self.ignore_index is None else annotated_cells(label, coarse.shape[2:], self.ignore_index)
        return loss + self.coarse_weight * _cross_entropy(coarse.float(), aim, annotated)

    def _of_points(self, logits: Tensor, values: Tensor) -> Tensor:
        annotated = None if self.ignore_index is None else values != self.ignore_index
        if self.point_loss is None:
            return _cross_entropy(logits, values.long(), annotated)
        if annotated is not None and not bool(annotated.all()):
            items = annotated.any(1)
            self._check_point_loss(annotated[items])
            logits, values = logits[items], values[items]
            if len(values) == 0:
                return logits.sum()
        return self.point_loss(logits, values[:, None])

    def _check_point_loss(self, annotated: Tensor) -> None:
        names = ("ignore_index", "ignore_label")
        leaves_out = any(getattr(self.point_loss, name, None) == self.ignore_index for name in names)
        if not leaves_out and not bool(annotated.all()):
            raise InputError(
                f"{int((~annotated).sum())} points lie in voxels with the ignored label {self.ignore_index}, which "
                f"{type(self.point_loss).__name__} would take for a class: draw points with ignore_index="
                f"{self.ignore_index}, or leave point_loss out."
            )


def coarse_label(label: Tensor, shape: torch.Size | tuple[int, ...], channels: int, ignore_index: int | None) -> Tensor:
    """What the low-resolution logits shall say.

    Args:
        label: (B, 1, H, W, D) whole numbers, background 0.
        shape: extents (h, w, d) of the coarse grid.
        channels: logits K; with 1 every label above 0 is foreground.
        ignore_index: label of voxels that do not count.

    Returns:
        (B, h, w, d) int64: 0 where a cell has no foreground, else its most frequent foreground label. Cells without
        foreground but with ignored voxels have 0 too; :func:`annotated_cells` tells them apart.
    """
    volume = label.as_subclass(Tensor)
    if channels == 1:
        foreground = volume > 0 if ignore_index is None else (volume > 0) & (volume != ignore_index)
        return F.adaptive_max_pool3d(foreground.float(), tuple(shape))[:, 0].long()
    fractions = [F.adaptive_avg_pool3d((volume == c).float(), tuple(shape))[:, 0] for c in range(1, channels)]
    if ignore_index is not None and 1 <= ignore_index < channels:
        fractions[ignore_index - 1].zero_()
    most, which = torch.stack(fractions).max(0)
    return torch.where(most > 0, which + 1, 0)


def annotated_cells(label: Tensor, shape: torch.Size | tuple[int, ...], ignore_index: int) -> Tensor:
    """Which coarse cells are known, (B, h, w, d) boolean: they hold foreground, or no ignored voxel; for the others
    nobody knows whether they are empty. See :func:`coarse_label`.
    """
    volume = label.as_subclass(Tensor)
    ignored = volume == ignore_index
    filled, doubtful = (
        F.adaptive_max_pool3d(mask.float(), tuple(shape))[:, 0] > 0 for mask in ((volume > 0) & ~ignored, ignored)
    )
    return filled | ~doubtful


def _cross_entropy(logits: Tensor, values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over the places (B, ...) that are counted, all of them for None; 0 where none is."""
    if counted is not None and not bool(counted.all()):
        logits, values = logits.movedim(1, -1)[counted], values[counted]
        if len(values) == 0:
            return logits.sum()
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], (values > 0).to(logits.dtype))
    return F.cross_entropy(logits, values)

"""The liver tumour loss and the two lesion scores of Hou et al. 2019."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.metrics import CumulativeIterationMetric
from torch import nn


class LiverTumorLoss(nn.Module):
    """0.2 Dice + 0.8 weighted cross entropy, Hou et al. 2019 (https://arxiv.org/abs/1909.03108) and their code.

    The Dice term is minus the mean of the lesion's soft Dice per case and over the whole batch, 2 I / (S + 0.1); cross
    entropy weighs background, liver and lesion voxels by 1, 8 and 16 and is averaged over all voxels.

    Args:
        class_weights: weight per class.
        lesion: class of the Dice term.
        dice_share: share of the Dice term.
    """

    def __init__(
        self, class_weights: Sequence[float] = (1.0, 8.0, 16.0), lesion: int = 2, dice_share: float = 0.2
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", torch.tensor(list(class_weights)), persistent=False)
        self.class_weights: torch.Tensor
        self.lesion, self.dice_share = lesion, dice_share

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of logits (B, C, spatial...) and labels (B, 1, spatial...)."""
        labels = target[:, 0].long()
        weights = self.class_weights.to(prediction)
        entropy = F.cross_entropy(prediction, labels, weight=weights, reduction="none").mean()
        p = prediction.softmax(1)[:, self.lesion]
        t = (labels == self.lesion).to(p.dtype)
        space = tuple(range(1, p.dim()))
        hit, size = (p * t).sum(space), (p + t).sum(space)
        per_case = (2 * hit / (size + 0.1)).mean()
        overall = 2 * hit.sum() / (size.sum() + 0.1)
        return (1 - self.dice_share) * entropy - self.dice_share * (per_case + overall) / 2


class LesionDiceMetric(CumulativeIterationMetric):
    """Dice of one class per case (mean over cases) or global (over all voxels of all cases), the two LiTS scores.

    Args:
        lesion: class that counts.
        overall: the global score instead of the mean over cases. A case without the class in truth and prediction
            counts 1 per case and nothing globally.
    """

    def __init__(self, lesion: int = 2, overall: bool = False) -> None:
        super().__init__()
        self.lesion, self.overall = lesion, overall

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """Intersection and size per case, from label maps (B, 1, ...) or one-hot maps (B, C, ...)."""
        if y is None:
            raise ValueError("LesionDiceMetric needs y, the true labels.")
        a, b = (t[:, self.lesion] > 0.5 if t.shape[1] > 1 else t[:, 0] == self.lesion for t in (y_pred, y))
        space = tuple(range(1, a.dim()))
        return torch.stack([(a & b).sum(space), a.sum(space) + b.sum(space)], dim=1).double()

    def aggregate(self) -> torch.Tensor:
        """The score so far, a scalar in [0, 1]."""
        data = self.get_buffer()
        if not isinstance(data, torch.Tensor) or data.numel() == 0:
            raise ValueError("LesionDiceMetric has seen no case.")
        hit, size = data.unbind(1)
        if self.overall:
            return 2 * hit.sum() / size.sum().clamp_min(1)
        return torch.where(size > 0, 2 * hit / size.clamp_min(1), 1.0).mean()

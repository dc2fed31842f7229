"""The two lesion scores of the LiTS challenge, as in Hou et al. 2019."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric
from torch import Tensor

from monai_memeff.arguments import check_count, numbers_checked
from monai_memeff.checks import check_labels


class LesionDiceMetric(CumulativeIterationMetric):
    """Dice of one class per case (mean over cases) or global (over all voxels of all cases), the two LiTS scores.

    Both ``y_pred`` and ``y`` are label maps (B, 1, spatial...) or one-hot maps (B, classes, spatial...).

    Args:
        lesion: Class that counts.
        classes: Number of classes with background; other labels, such as 255 for "not annotated", are refused.
        overall: Return the global score instead of the mean over cases. A case without the class in truth and
            prediction counts 1 per case and nothing globally; where all are such, the global score is 0.

    Raises:
        ValueError: lesion below 1 or none of the classes; when called, no truth, another grid or number of classes, or
            values that are neither labels nor one-hot.

    Examples:
        >>> metric, label = LesionDiceMetric(), torch.tensor([0, 1, 2, 2]).view(1, 1, 4, 1, 1)
        >>> _ = metric(label, label)
        >>> metric.aggregate()
        tensor(1., dtype=torch.float64)
    """

    @numbers_checked
    def __init__(self, lesion: int = 2, overall: bool = False, classes: int = 3) -> None:
        super().__init__()
        check_count("lesion", lesion)
        if lesion >= classes:
            raise ValueError(f"lesion must be one of the {classes} classes, got {lesion}; set classes.")
        self.lesion, self.overall, self.classes = lesion, overall, classes

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        """Intersection and size per case, from label maps (B, 1, ...) or one-hot maps (B, C, ...).

        Raises:
            ValueError: no truth, another grid or number of classes, or values that are neither.
        """
        if y is None:
            raise ValueError("LesionDiceMetric needs y, the true labels.")
        for t in (y_pred, y):
            check_labels(t, "LesionDiceMetric", 2 if t.shape[1] > 1 else self.classes)
            if t.shape[1] not in (1, self.classes):
                raise ValueError(f"LesionDiceMetric needs 1 or {self.classes} channels, got {tuple(t.shape)}.")
        if y_pred.shape[2:] != y.shape[2:] or len(y_pred) != len(y):
            raise ValueError(f"prediction and truth must share a grid, got {tuple(y_pred.shape)}, {tuple(y.shape)}.")
        a, b = (t[:, self.lesion] > 0.5 if t.shape[1] > 1 else t[:, 0] == self.lesion for t in (y_pred, y))
        space = tuple(range(1, a.dim()))
        return torch.stack([(a & b).sum(space), a.sum(space) + b.sum(space)], dim=1).double()

    def aggregate(self) -> Tensor:
        """The score so far, a scalar in [0, 1]."""
        data = self.get_buffer()
        if not isinstance(data, Tensor) or data.numel() == 0:
            raise ValueError("LesionDiceMetric has seen no case.")
        hit, size = data.unbind(1)
        if self.overall:
            return 2 * hit.sum() / size.sum().clamp_min(1)
        return torch.where(size > 0, 2 * hit / size.clamp_min(1), 1.0).mean()

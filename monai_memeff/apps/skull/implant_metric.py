"""ImplantMetric: the skull-completion challenge's scores in MONAI's engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import ensure_tuple

from monai_memeff.apps.skull.metrics import compute_border_dice, compute_implant_dice, compute_pooled_hausdorff
from monai_memeff.arguments import check_positive, numbers_checked

SCORES = ("dice", "border_dice", "hd95")


class ImplantMetric(CumulativeIterationMetric):
    """One score of the skull-completion challenge, cumulative over batches, for MONAI's engines and handlers.

    ``y_pred`` and ``y`` are (B, C, H, W, D), the predicted and the true implant in their first channel; for
    ``score="border_dice"`` the second channel of ``y`` is the defective skull, so that the metric fits handlers that
    pass two values only (join them with ``ConcatItemsd``). A batch scores (B, 1).

    Args:
        score: ``"dice"``, ``"border_dice"`` or ``"hd95"`` (see :func:`compute_implant_dice`,
            :func:`compute_border_dice`, :func:`compute_pooled_hausdorff` for what empty implants score).
        spacing: millimeters per voxel, one number or one per axis; None reads it from ``y`` where that is a
            MetaTensor, and is 1 mm where it is not.
        distance_mm: width of the border for ``"border_dice"``.
        percentile: Percentile of the surface distances for ``"hd95"``.
        reduction: MONAI's modes of reduction.
        get_not_nans: whether ``aggregate`` also returns the count of values that are not NaN.

    Raises:
        ValueError: when ``score`` is unknown.

    Examples:
        >>> implant, defective = torch.ones(2, 1, 1, 8, 8, 8)
        >>> metric = ImplantMetric(score="border_dice", spacing=1.0)
        >>> _ = metric(y_pred=implant, y=torch.cat([implant, defective], dim=1))
        >>> metric.aggregate().item()
        1.0
    """

    @numbers_checked
    def __init__(
        self,
        score: str = "dice",
        spacing: float | Sequence[float] | None = None,
        distance_mm: float = 10.0,
        percentile: float = 95.0,
        reduction: str = "mean",
        get_not_nans: bool = False,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        for step in ensure_tuple(1 if spacing is None else spacing):
            check_positive("spacing", step)
        self.score, self.spacing = score, spacing
        self.distance_mm, self.percentile = distance_mm, percentile
        self.reduction, self.get_not_nans = reduction, get_not_nans

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if y is None:
            raise ValueError("ImplantMetric compares with a truth: pass y")
        wanted = 2 if self.score == "border_dice" else 1
        if y.shape[1] < wanted:
            raise ValueError(
                f"{self.score} needs {wanted} channels in y (true implant, defective skull), got {y.shape[1]}"
            )
        y_pred, truth = y_pred[:, :1], y[:, :1]
        if self.score == "dice":
            return compute_implant_dice(y_pred, truth)
        spacing = self.spacing if self.spacing is not None else _spacing_of(y)
        if self.score == "hd95":
            return compute_pooled_hausdorff(y_pred, truth, spacing, self.percentile)
        return compute_border_dice(y_pred, truth, y[:, 1:2], spacing, self.distance_mm)

    def aggregate(self, reduction: str | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Reduce what has been gathered.

        Args:
            reduction: overrides the mode given at construction.

        Returns:
            The reduced score, with the count of its values when ``get_not_nans``.

        Raises:
            ValueError: when nothing has been gathered.
        """
        data = self.get_buffer()
        if not isinstance(data, torch.Tensor):
            raise ValueError("nothing to aggregate: call the metric on a batch first")
        value, not_nans = do_metric_reduction(data, reduction or self.reduction)
        return (value, not_nans) if self.get_not_nans else value


def _spacing_of(y: torch.Tensor) -> list[list[float]] | None:
    """Spacing of every item of a batch, from the affines it carries: one (4, 4), or one per item."""
    if not isinstance(y, MetaTensor):
        return None
    affine = torch.as_tensor(y.affine, dtype=torch.float64).reshape(-1, y.ndim - 1, y.ndim - 1)
    if len(affine) not in (1, y.shape[0]):
        return None
    columns = affine[:, :-1, :-1].norm(dim=1).expand(y.shape[0], -1)
    return [row.tolist() for row in columns]

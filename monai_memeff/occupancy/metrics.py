"""Dice of sampled points, as the paper scores; dense Dice is MONAI's DiceMetric, and the two differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from torch import Tensor

from monai_memeff.arguments import check_count, numbers_checked
from monai_memeff.checks import check_labels
from monai_memeff.occupancy.checks import plain_tensor
from monai_memeff.occupancy.sampling import (
    PUBLISHED_BAND,
    checked_band,
    checked_fractions,
    checked_label,
    sample_points,
)


class SampledDiceMetric(CumulativeIterationMetric):
    """Dice over points drawn as the paper does, not over all voxels.

    Reich et al., BMVC 2021 (arXiv 2110.10640), section 4 and code: 2^17 uniform points for BraTS; 2^14 points, 40 % of
    them near the border, for LiTS. Points near the border are the hard ones, so for a large organ this score lies below
    the dense one.

    Args:
        num_samples: Number of points per volume.
        sampling: Fractions, default the paper's for LiTS; ``"uniform"`` with ``num_samples=2**17`` is that for BraTS.
        classes: labels 1 ... ``classes`` are scored one by one; a label without a point in prediction and truth is NaN
            and left out of means.
        reduction: Reduction, as in MONAI's metrics.
        seed: Seed of the points; each volume gets its own, the same every time.
        band_width: Width in voxels of the dilation of the border.
        ignore_index: Label of voxels in the truth that are not scored; a volume of nothing else scores NaN.

    Raises:
        ValueError: num_samples or classes below 1, an even band_width, or a wrong ``sampling``.

    Examples:
        >>> metric, label = SampledDiceMetric(num_samples=64), torch.ones(2, 1, 8, 8, 8)
        >>> metric(label, label).shape
        torch.Size([2, 1])
        >>> metric.aggregate()
        tensor([1.])
    """

    @numbers_checked
    def __init__(
        self,
        num_samples: int = 2**14,
        sampling: str | Mapping[str, float] | None = None,
        classes: int = 1,
        reduction: str = "mean",
        seed: int = 0,
        band_width: int = PUBLISHED_BAND,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        check_count("num_samples", num_samples)
        check_count("classes", classes)
        self.num_samples, self.classes, self.reduction, self.seed, self.band_width = (
            num_samples,
            classes,
            reduction,
            seed,
            checked_band(band_width),
        )
        self.sampling = checked_fractions(sampling or {"border": 0.4, "uniform": 0.6})

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Dice (B, classes) of label volumes (B, 1, H, W, D).

        Raises:
            ValueError: shapes differ, or are none of label volumes.
        """
        if y is None or y_pred.shape != y.shape or y.ndim != 5 or y.shape[1] != 1:
            found = None if y is None else tuple(y.shape)
            raise ValueError(
                f"prediction and truth must be labels (B, 1, H, W, D), got {tuple(y_pred.shape)}, {found}."
            )
        pairs = zip(plain_tensor(y_pred), plain_tensor(y), strict=True)
        return torch.stack([self._one(guess, truth) for guess, truth in pairs])

    def _one(self, guess: Tensor, truth: Tensor) -> Tensor:
        numbers = torch.Generator().manual_seed(self.seed)

        def draw(limit: int, count: int) -> Tensor:
            return torch.randint(limit, (count,), generator=numbers)

        points, true = sample_points(truth, self.num_samples, self.sampling, draw, self.band_width, self.ignore_index)
        i, j, k = points.long().unbind(1)
        found = checked_label(guess)[i, j, k].long()
        check_labels(found, "the predicted label")
        if self.ignore_index is not None:
            found, true = found[true != self.ignore_index], true[true != self.ignore_index]
        scores = []
        for label in range(1, self.classes + 1):
            both = ((found == label) & (true == label)).sum()
            scores.append(2 * both / ((found == label).sum() + (true == label).sum()))
        return torch.stack(scores).float()

    def aggregate(self, reduction: str | None = None) -> Tensor:
        """Mean (or another reduction) over what was scored; NaN is left out."""
        data = self.get_buffer()
        if not isinstance(data, Tensor):
            raise ValueError("nothing was scored yet: call the metric first.")
        return do_metric_reduction(data, reduction or self.reduction)[0]

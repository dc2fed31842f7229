"""Batch norm whose scale and shift are a linear function of a condition, such as the code of a volume."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked

Statistics = Literal["scalar", "feature"]


class ConditionalBatchNorm(nn.Module):
    """Batch norm of point features (B, N, F), scaled and shifted by linear functions of a condition (B, L).

    Reich et al., BMVC 2021 (arXiv 2110.10640), section 3. Scale and shift start at 1 and 0 for every condition.

    Args:
        features: F.
        condition_features: L.
        statistics: ``"scalar"``: one mean and variance over points and features, as the authors' code computes them;
            ``"feature"``: one per feature over the points, as batch norm is usually understood.
        momentum: Momentum of the running statistics.

    Raises:
        ValueError: another word for ``statistics``.

    Examples:
        >>> norm = ConditionalBatchNorm(features=8, condition_features=4)
        >>> norm(torch.rand(2, 100, 8), condition=torch.rand(2, 4)).shape
        torch.Size([2, 100, 8])
    """

    @numbers_checked
    def __init__(
        self, features: int, condition_features: int, statistics: Statistics = "scalar", momentum: float = 0.1
    ) -> None:
        super().__init__()
        if statistics not in ("scalar", "feature"):
            raise ValueError(f"statistics must be 'scalar' or 'feature', got {statistics!r}.")
        self.statistics = statistics
        self.norm = nn.BatchNorm1d(1 if statistics == "scalar" else features, momentum=momentum, affine=False)
        self.scale = nn.Linear(condition_features, features)
        self.shift = nn.Linear(condition_features, features)
        for layer, start in ((self.scale, 1.0), (self.shift, 0.0)):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, start)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Normalize (B, N, F) for the conditions (B, L)."""
        rows = x.flatten(0, 1)
        normed = self.norm(rows[:, None] if self.statistics == "scalar" else rows).view_as(x)
        return self.scale(condition)[:, None] * normed + self.shift(condition)[:, None]

"""The decoder that is queried at points: residual fully connected blocks under conditional batch norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from monai_memeff.occupancy.nn.activation import activation
from monai_memeff.occupancy.nn.norm import ConditionalBatchNorm, Statistics


class PointBlock(nn.Module):
    """Linear, norm, activation, linear, norm, beside a residual path; Reich et al., BMVC 2021, section 3.

    Shape: (B, N, in_features) and a condition (B, L) -> (B, N, out_features).
    """

    def __init__(
        self, in_features: int, out_features: int, condition: int, act: tuple | str, statistics: Statistics
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.norm_1 = ConditionalBatchNorm(out_features, condition, statistics)
        self.act_1 = activation(act)
        self.linear_2 = nn.Linear(out_features, out_features)
        self.norm_2 = ConditionalBatchNorm(out_features, condition, statistics)
        self.residual = nn.Identity() if in_features == out_features else nn.Linear(in_features, out_features)
        self.act_2 = activation(act)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Features of points."""
        y = self.act_1(self.norm_1(self.linear_1(x), condition))
        return self.act_2(self.norm_2(self.linear_2(y), condition) + self.residual(x))


class PointDecoder(nn.Module):
    """Blocks of one width, then one linear layer without bias to the logits.

    Args:
        in_features: Number of features of a point.
        out_channels: logits K.
        width: features between.
        blocks: how many.
        condition: features of a condition.
        act: ``"PADE"``, or an activation as in MONAI.
        statistics: see :class:`~monai_memeff.occupancy.nn.norm.ConditionalBatchNorm`.
    """

    def __init__(
        self,
        in_features: int,
        out_channels: int,
        width: int,
        blocks: int,
        condition: int,
        act: tuple | str,
        statistics: Statistics,
    ) -> None:
        super().__init__()
        inputs = (in_features, *[width] * (blocks - 1))
        self.blocks = nn.ModuleList(PointBlock(before, width, condition, act, statistics) for before in inputs)
        self.final = nn.Linear(width, out_channels, bias=False)

    def forward(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Logits (B, N, K) of point features (B, N, F), one condition (B, L) per block."""
        for block, condition in zip(self.blocks, conditions, strict=True):
            x = block(x, condition)
        return self.final(x)

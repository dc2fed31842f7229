"""Encoders of occupancy networks: residual blocks, and what the decoder is told of a volume."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from monai.networks.layers import get_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.occupancy.nn.activation import PadeActivation, activation
from monai_memeff.pooling import average_pool


class ResidualDownBlock(nn.Module):
    """Two 3^3 convolutions with half the resolution in between, beside a 1^3 convolution; Reich et al., section 3.

    Shape: (B, in_channels, H, W, D) -> (B, out_channels, ceil(H / 2), ceil(W / 2), ceil(D / 2)); an odd last plane is
    averaged over what is there.
    """

    def __init__(self, in_channels: int, out_channels: int, act: tuple | str, norm: tuple | str) -> None:
        super().__init__()
        self.conv_1 = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm_1 = get_norm_layer(norm, 3, out_channels)
        self.act_1 = activation(act)
        self.conv_2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm_2 = get_norm_layer(norm, 3, out_channels)
        same = in_channels == out_channels
        self.residual = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1, bias=False)
        self.act_2 = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Features at half the resolution."""
        y = _halve(self.act_1(self.norm_1(self.conv_1(x))))
        return self.act_2(self.norm_2(self.conv_2(y)) + self.residual(_halve(x)))


class ResidualEncoder(nn.Module):
    """A chain of :class:`ResidualDownBlock`; the features after each of them, finest first, at strides 2, 4, 8, ...

    Args:
        in_channels: Number of channels of the volume.
        channels: features after each block.
        act: ``"PADE"``, or an activation as in MONAI.
        norm: Norm, as in MONAI.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], act: tuple | str, norm: tuple | str) -> None:
        super().__init__()
        pairs = pairwise((in_channels, *channels))
        self.blocks = nn.ModuleList(ResidualDownBlock(before, after, act, norm) for before, after in pairs)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of (B, in_channels, H, W, D), one tensor per block."""
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features


class PlainLatentHead(nn.Module):
    """The last features as one latent vector for the input and all blocks: 5^3 convolution to one channel.

    Returns ``blocks + 1`` times the same (B, latent voxels).
    """

    def __init__(self, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.copies = blocks + 1
        self.head = _head(channels[-1], 1, bias=True)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Latent vectors, the decoder's input first."""
        return (self.head(features[-1]).flatten(1),) * self.copies


class SkipLatentHead(nn.Module):
    """Features of all blocks as latent vectors: one for the input, one for each block of the decoder.

    Every block's features are max-pooled to the latent grid and halved by a 5^3 convolution; a 5^3 convolution of all
    makes one channel per vector.
    """

    def __init__(self, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        halves = [max(1, width // 2) for width in channels]
        self.skips = nn.ModuleList(_head(width, half, bias=False) for width, half in zip(channels, halves, strict=True))
        self.head = _head(sum(halves), blocks + 1, bias=True)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Latent vectors, the decoder's input first."""
        grid = features[-1].shape[2:]
        pooled = [F.adaptive_max_pool3d(level, grid) for level in features]
        joined = torch.cat([skip(level) for skip, level in zip(self.skips, pooled, strict=True)], 1)
        return self.head(joined).flatten(2).unbind(1)


class PooledLatentHead(nn.Module):
    """The mean of the last features as the one condition, for an encoder of any kind and volumes of any extents."""

    def __init__(self, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.copies = blocks + 1

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Conditions (B, channels[-1]), the decoder's input first."""
        return (features[-1].mean((2, 3, 4)),) * self.copies


class AuxiliaryHead(nn.Conv3d):
    """The published auxiliary head: low-resolution logits from the last features by a 5^3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 5, padding=2, bias=False)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, h, w, d) on the latent grid."""
        return super().forward(features[-1])


class CoarseHead(nn.Module):
    """Low-resolution logits from features of every level, for an encoder of any kind.

    A 1^3 convolution of each level, resized to one of them and summed.

    Args:
        channels: features of the levels, finest first.
        out_channels: logits.
        level: Level whose resolution the logits have.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, level: int) -> None:
        super().__init__()
        self.level = level
        self.heads = nn.ModuleList(nn.Conv3d(width, out_channels, 1) for width in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, h, w, d)."""
        grid = features[self.level].shape[2:]
        scores = [head(level) for head, level in zip(self.heads, features, strict=True)]
        resized = [F.interpolate(s, grid, mode="trilinear", align_corners=False) for s in scores]
        return torch.stack(resized).sum(0)


def _halve(x: Tensor) -> Tensor:
    kernel = [min(2, extent) for extent in x.shape[2:]]  # an axis of one voxel stays
    return average_pool(x, kernel, ceil_mode=True)


def _head(in_channels: int, out_channels: int, bias: bool) -> nn.Sequential:
    convolution = nn.Conv3d(in_channels, out_channels, 5, padding=2, bias=bias)
    return nn.Sequential(convolution, nn.BatchNorm3d(out_channels), PadeActivation())

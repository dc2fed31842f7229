"""Small cubes of a volume around points, gathered for the points at hand and never for all voxels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.occupancy.nn.activation import activation
from monai_memeff.pooling import average_pool

PATCH_SIZE = 7
VALUES = PATCH_SIZE**3


def voxels_of(points: Tensor, spatial_shape: tuple[int, ...]) -> Tensor:
    """The voxels (..., 3) int64 that hold points (..., 3) given in voxel indices; voxel i covers [i - 1/2, i + 1/2)."""
    extent = torch.tensor(spatial_shape, device=points.device)
    return torch.minimum((points + 0.5).floor().long().clamp(min=0), extent - 1)


def halved(volume: Tensor) -> Tensor:
    """Means of 2^3 voxels at every place: (B, C, H, W, D) -> (B, C, H + 1, W + 1, D + 1).

    Place i holds the mean of voxels i - 1 and i along every axis, zeros outside. Every second place of it around a
    voxel is the average-pooled patch of twice the size around that voxel.
    """
    return average_pool(F.pad(volume, (1,) * 6), 2, 1)


def gather_patches(
    volume: Tensor, voxels: Tensor, step: int = 1, size: int = PATCH_SIZE, dtype: torch.dtype | None = None
) -> Tensor:
    """Cubes of ``size``^3 values around voxels, zeros outside the volume.

    Args:
        volume: (B, C, H, W, D).
        voxels: (B, N, 3) int64 centers (i, j, k) in the volume.
        step: distance between the values of a cube, in voxels.
        size: odd edge of the cubes.
        dtype: Type of the result, default that of the volume. Only what is gathered is converted.

    Returns:
        (B, N, C, size^3).
    """
    offsets = (torch.arange(size, device=voxels.device) - size // 2) * step
    wanted = voxels[..., None] + offsets  # B, N, 3, size
    extent = torch.tensor(volume.shape[2:], device=voxels.device)[:, None]
    inside = (wanted >= 0) & (wanted < extent)
    i, j, k = torch.minimum(wanted.clamp(min=0), extent - 1).unbind(2)
    plane = (i[..., :, None] * volume.shape[3] + j[..., None, :]) * volume.shape[4]
    places = (plane[..., None] + k[..., None, None, :]).flatten(1)  # B, N * size^3
    kept = inside[:, :, 0, :, None, None] & inside[:, :, 1, None, :, None] & inside[:, :, 2, None, None, :]
    rows = [values.flatten(1).index_select(1, place) for values, place in zip(volume, places, strict=True)]
    values = torch.stack(rows).view(*volume.shape[:2], -1, size**3).to(dtype or volume.dtype)
    return (values * kept.flatten(2)[:, None]).transpose(1, 2)


class PatchConv(nn.Conv3d):
    """A convolution of 7^3 patches with a 7^3 kernel and zeros around, as one matrix product per batch of patches.

    Every value of the result sees every value of the patch, so the convolution is a dense matrix made of its kernel; on
    a CPU the product is several times faster than the convolution.

    Shape: (..., in_channels * 343) -> (..., out_channels * 343).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, PATCH_SIZE, padding=PATCH_SIZE // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve patches with flattened channels and places."""
        kernel = F.pad(self.weight, (PATCH_SIZE // 2,) * 6)
        for axis in (2, 3, 4):
            kernel = kernel.unfold(axis, PATCH_SIZE, 1)  # o, c, 7 shifts per axis, 7 places per axis
        matrix = kernel.flip(2, 3, 4).permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(self.out_channels * VALUES, -1)
        bias = None if self.bias is None else self.bias.repeat_interleave(VALUES)
        return F.linear(x, matrix, bias)


class PatchEncoder(nn.Sequential):
    """The published patch encoder: two 7^3 convolutions to one channel, each with an activation.

    Shape: (..., in_channels * 343), twice as many with mid-range patches -> (..., 343).
    """

    features = VALUES

    def __init__(self, in_channels: int, mid_range: bool, act: tuple | str) -> None:
        channels = 2 * in_channels if mid_range else in_channels
        between = max(1, channels // 2)
        super().__init__(PatchConv(channels, between), activation(act), PatchConv(between, 1), activation(act))


class PatchLinear(nn.Sequential):
    """Our own patch encoder, one linear layer: a 7^3 convolution of the volume, computed at the points only.

    Shape: (..., in_channels * 343) -> (..., features).
    """

    def __init__(self, in_channels: int, features: int, act: tuple | str) -> None:
        super().__init__(nn.Linear(in_channels * VALUES, features), activation(act))
        self.features = features

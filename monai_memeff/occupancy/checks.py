"""What is refused before work starts, and tensors with and without metadata."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.checks import as_network_input, has_values


def plain_tensor(volume: Tensor) -> Tensor:
    """The tensor without metadata."""
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume


def checked_volume(
    volume: Tensor, in_channels: int, volume_shape: tuple[int, ...] | None, dtype: torch.dtype
) -> Tensor:
    """The volume in the network's dtype without metadata; ValueError for wrong channels or extents, NaN or infinity."""
    volume = plain_tensor(as_network_input(volume, dtype, "OccupancyNet"))
    shape = tuple(volume.shape[2:])
    if volume.ndim != 5 or volume.shape[1] != in_channels or 0 in volume.shape:
        raise ValueError(f"a volume must be (B, {in_channels}, H, W, D) and not empty, got {tuple(volume.shape)}.")
    if volume_shape is not None and volume_shape != shape:
        raise ValueError(
            f"this network was made for volumes of {volume_shape} voxels, got {shape}: resize or pad them, or use "
            "variant='interpolated', which takes any extents."
        )
    return volume


def checked_points(points: Tensor, volume: Tensor) -> Tensor:
    """Points (B, N, 3) as floating point; ValueError for another shape or points that are not in the volume."""
    points = plain_tensor(points)
    if points.ndim != 3 or points.shape[0] != len(volume) or points.shape[2] != 3:
        raise ValueError(f"points must be ({len(volume)}, N, 3) for this volume, got {tuple(points.shape)}.")
    points = points if points.is_floating_point() else points.float()
    if not has_values(points):
        return points
    shape = tuple(volume.shape[2:])
    last = torch.tensor(shape, device=points.device) - 0.5
    outside = ~((points >= -0.5) & (points <= last)).all(-1)
    if bool(outside.any()):
        raise ValueError(
            f"points must lie in the volume of {shape} voxels (indices from -0.5 to the extent - 0.5), got "
            f"{int(outside.sum())} outside, the first {points[outside][0].tolist()}; clamp or leave them out."
        )
    return points


def checked_shape(volume_shape: Sequence[int] | None, step: int) -> tuple[int, ...]:
    """The extents as integers; ValueError unless they are three multiples of ``step``."""
    shape = tuple(int(extent) for extent in volume_shape or ())
    if len(shape) != 3 or any(extent < step or extent % step for extent in shape):
        raise ValueError(
            f"volume_shape must be three multiples of {step} (downscale * 2^levels), got {volume_shape}; resize or pad "
            "the volumes, or use variant='interpolated', which takes any extents."
        )
    return shape

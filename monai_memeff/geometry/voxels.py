"""Integer voxel coordinates as sortable keys: pack, unpack, coarsen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_EXTENT = 2**18
"""Largest number of voxels along one axis."""

MAX_KEY = 2**63 - 1
"""Keys are signed 64-bit integers."""


def check_extent(spatial_shape: Sequence[int], batch_size: int) -> None:
    """Refuse a grid whose voxels cannot be numbered by 64-bit keys.

    Args:
        spatial_shape: voxels along the axes (i, j, k).
        batch_size: number of volumes that share the key range.

    Raises:
        ValueError: an axis is empty or longer than 2^18, there is no volume, or more than 2^63 - 1 voxels in all.
    """
    if len(spatial_shape) != 3 or min(spatial_shape) < 1 or max(spatial_shape) > MAX_EXTENT:
        raise ValueError(
            f"spatial_shape must be three extents between 1 and {MAX_EXTENT} (2^18), got {tuple(spatial_shape)}; "
            "crop or resample the volume first."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; give at least one volume.")
    voxels = batch_size
    for extent in spatial_shape:
        voxels *= extent
    if voxels > MAX_KEY:
        raise ValueError(
            f"batch_size * voxels must be at most 2^63 - 1, got batch_size {batch_size} "
            f"with spatial_shape {tuple(spatial_shape)}; use a smaller batch."
        )


def coordinates_to_keys(coordinates: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Number voxels in lexicographic order of (batch, i, j, k).

    Args:
        coordinates: (N, 4) integers [batch, i, j, k], all inside the grid.
        spatial_shape: voxels along the axes (i, j, k).

    Returns:
        (N,) int64 keys ``((batch * H + i) * W + j) * D + k``.
    """
    _, width, depth = spatial_shape
    batch, i, j, k = coordinates.to(torch.int64).unbind(1)
    return ((batch * spatial_shape[0] + i) * width + j) * depth + k


def keys_to_coordinates(keys: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Invert :func:`coordinates_to_keys`: (N,) keys to (N, 4) int64 [batch, i, j, k]."""
    height, width, depth = spatial_shape
    line = keys.div(depth, rounding_mode="floor")
    plane = line.div(width, rounding_mode="floor")
    batch = plane.div(height, rounding_mode="floor")
    return torch.stack((batch, plane - batch * height, line - plane * width, keys - line * depth), dim=1)


def regrid(
    keys: Tensor,
    spatial_shape: Sequence[int],
    new_shape: Sequence[int],
    scale: Sequence[int] = (1, 1, 1),
    shift: Sequence[int] = (0, 0, 0),
    shrink: bool = False,
) -> Tensor:
    """Keys of the same voxels on another grid: ``scale * c + shift``, or ``floor(c / scale)`` with ``shrink``.

    Args:
        keys: (N,) int64 on the grid ``spatial_shape``.
        spatial_shape: (H, W, D) of the old grid.
        new_shape: (H', W', D') of the new grid, which must hold every new coordinate.
        scale: factor or divisor per axis.
        shift: added per axis after scaling.
        shrink: divide instead of multiplying.

    Returns:
        (N,) int64 keys, in the order of the old ones.
    """
    if not shrink:
        return _scaled(keys, spatial_shape, new_shape, scale, shift)
    rest, pitch, new_keys = keys, 1, torch.zeros_like(keys)
    for axis in (2, 1, 0):
        higher = rest.div(spatial_shape[axis], rounding_mode="floor")
        coordinate = torch.sub(rest, higher, alpha=spatial_shape[axis])
        new_keys.add_(coordinate.div_(scale[axis], rounding_mode="floor").add_(shift[axis]), alpha=pitch)
        rest, pitch = higher, pitch * new_shape[axis]
    return new_keys.add_(rest, alpha=pitch)


def _scaled(keys: Tensor, old: Sequence[int], new: Sequence[int], scale: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The new key as a linear combination of the old one and of the numbers of its line, its plane and its volume."""
    pitches = (new[1] * new[2], new[2], 1)
    steps = [s * pitch for s, pitch in zip(scale, pitches, strict=True)]
    result = keys * steps[2]
    result += sum(offset * pitch for offset, pitch in zip(shift, pitches, strict=True))
    higher_step = (steps[1], steps[0], new[0] * pitches[0])
    number = keys
    for axis, step, above in zip((2, 1, 0), (steps[2], steps[1], steps[0]), higher_step, strict=True):
        number = number.div(old[axis], rounding_mode="floor")
        result.add_(number, alpha=above - step * old[axis])
    return result

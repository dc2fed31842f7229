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
        (N,) int64 keys ``((batch * H + i) * W + j) * D + k``; a coordinate outside the grid is not noticed.

    Examples:
        >>> coordinates_to_keys(torch.tensor([[0, 0, 0, 3], [1, 0, 0, 0]]), (4, 4, 4))
        tensor([ 3, 64])
    """
    _, width, depth = spatial_shape
    batch, i, j, k = coordinates.to(torch.int64).unbind(1)
    return ((batch * spatial_shape[0] + i) * width + j) * depth + k


def keys_to_coordinates(keys: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Invert :func:`coordinates_to_keys`: (N,) int64 keys to (N, 4) int64 [batch, i, j, k].

    Examples:
        >>> keys_to_coordinates(torch.tensor([3, 64]), (4, 4, 4))
        tensor([[0, 0, 0, 3],
                [1, 0, 0, 0]])
    """
    height, width, depth = spatial_shape
    line = _floor_divided(keys, depth)
    plane = _floor_divided(line, width)
    batch = _floor_divided(plane, height)
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
        (N,) int64 keys, in the order of the old ones; on an unchanged grid the old ones themselves.
    """
    if not shrink:
        same = tuple(spatial_shape) == tuple(new_shape) and tuple(scale) == (1, 1, 1) and not any(shift)
        return keys if same else _scaled(keys, spatial_shape, new_shape, scale, shift)
    if not any(shift) and all(n == m * s for n, m, s in zip(spatial_shape, new_shape, scale, strict=True)):
        return _shrunk(keys, new_shape, scale)
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
    moved = sum(offset * pitch for offset, pitch in zip(shift, pitches, strict=True))
    if moved:
        result += moved
    higher_step = (steps[1], steps[0], new[0] * pitches[0])
    number = keys
    for axis, step, above in zip((2, 1, 0), (steps[2], steps[1], steps[0]), higher_step, strict=True):
        number = _floor_divided(number, old[axis])
        result.add_(number, alpha=above - step * old[axis])
    return result


def _shrunk(keys: Tensor, new: Sequence[int], scale: Sequence[int]) -> Tensor:
    """Shrinking where the new grid times the scale is the old one: whole lines and planes shrink by one division."""
    _, width, depth = new
    along_k = _floor_divided(keys, scale[2])  # old line * depth + new k
    line = _floor_divided(along_k, depth)
    along_j = _floor_divided(line, scale[1])  # old plane * width + new j
    plane = _floor_divided(along_j, width)
    along_i = _floor_divided(plane, scale[0])  # batch * height + new i
    rows = torch.add(along_j - line, along_i - plane, alpha=width)
    return torch.add(along_k, rows, alpha=depth)


def _floor_divided(keys: Tensor, by: int) -> Tensor:
    """Keys, none of which is negative, divided; by a power of two several times faster."""
    if by & (by - 1):
        return keys.div(by, rounding_mode="floor")
    return keys >> (by.bit_length() - 1) if by > 1 else keys

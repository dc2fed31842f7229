"""Integer voxel coordinates as sortable keys: pack, sort, look up, unite, coarsen."""

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
        ValueError: an axis is empty or longer than 2^18, or the whole grid has more than 2^63 - 1 voxels.
    """
    if len(spatial_shape) != 3 or min(spatial_shape) < 1 or max(spatial_shape) > MAX_EXTENT:
        raise ValueError(
            f"spatial_shape must be three extents between 1 and {MAX_EXTENT} (2^18), got {tuple(spatial_shape)}; "
            "crop or resample the volume first."
        )
    voxels = batch_size
    for extent in spatial_shape:
        voxels *= extent
    if batch_size < 1 or voxels > MAX_KEY:
        raise ValueError(
            f"batch_size must be at least 1 and batch_size * voxels at most 2^63 - 1, got batch_size {batch_size} "
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


def is_strictly_increasing(keys: Tensor) -> bool:
    """Whether (N,) keys are sorted and unique."""
    return bool((keys[1:] > keys[:-1]).all())


def find(keys: Tensor, queries: Tensor) -> Tensor:
    """Look queries up in a sorted list.

    Args:
        keys: (N,) int64, strictly increasing.
        queries: (M,) int64 in any order.

    Returns:
        (M,) int64 positions in ``keys``, -1 where a query is absent.
    """
    if keys.numel() == 0:
        return torch.full_like(queries, -1)
    position = torch.searchsorted(keys, queries)
    candidate = position.clamp(max=keys.numel() - 1)
    return torch.where(keys[candidate] == queries, candidate, -1)


def unite(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unite two sorted key lists.

    Args:
        first: (N,) int64, strictly increasing.
        second: (M,) int64, strictly increasing.

    Returns:
        The sorted union and the positions of the first and of the second list in it.
    """
    union = torch.unique(torch.cat((first, second)))
    return union, torch.searchsorted(union, first), torch.searchsorted(union, second)


def coarsen(coordinates: Tensor, stride: Sequence[int]) -> Tensor:
    """Map (N, 4) coordinates [batch, i, j, k] to the cells of size ``stride`` that hold them: floor(c / stride)."""
    divisor = torch.tensor((1, *stride), device=coordinates.device, dtype=coordinates.dtype)
    return coordinates.div(divisor, rounding_mode="floor")


def inside(coordinates: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Which of (N, 4) coordinates [batch, i, j, k] lie in the grid: (N,) boolean."""
    spatial = coordinates[:, 1:]
    limit = torch.tensor(tuple(spatial_shape), device=coordinates.device, dtype=coordinates.dtype)
    return ((spatial >= 0) & (spatial < limit)).all(dim=1)

"""What a sparse tensor refuses: rows and coordinates that do not fit each other or the grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_rows(features: Tensor, coordinates: Tensor) -> None:
    """Refuse anything but floating point (N, C) with integers (N, 4): ValueError."""
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point (N, C), got {features.dtype} of {tuple(features.shape)}; "
            "convert them with .float() and give one row per voxel."
        )
    integral = not (coordinates.is_floating_point() or coordinates.is_complex() or coordinates.dtype == torch.bool)
    if coordinates.shape != (len(features), 4) or not integral:
        raise ValueError(
            f"coordinates must be integers of shape ({len(features)}, 4) as [batch, i, j, k], "
            f"got {coordinates.dtype} of {tuple(coordinates.shape)}; put the batch index first."
        )


def check_inside(coordinates: Tensor, spatial_shape: Sequence[int], batch_size: int) -> None:
    """Refuse coordinates [batch, i, j, k] outside of the grid: ValueError."""
    if len(coordinates) == 0:
        return
    limits = (batch_size, *spatial_shape)
    lowest, highest = coordinates.amin(0).tolist(), coordinates.amax(0).tolist()
    for name, low, high, limit in zip(("batch", "i", "j", "k"), lowest, highest, limits, strict=True):
        if low < 0 or high >= limit:
            raise ValueError(
                f"coordinate {name} must lie in 0 ... {limit - 1}, got {low} ... {high}; "
                "crop the points or enlarge spatial_shape or batch_size."
            )

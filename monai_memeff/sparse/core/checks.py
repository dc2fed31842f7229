"""What sparse tensors and layers refuse: rows, coordinates and grids that do not fit each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_memeff.checks import check_finite
from monai_memeff.errors import InputError
from monai_memeff.sparse.core.voxel_set import VoxelSet


def check_rows(features: Tensor, coordinates: Tensor) -> None:
    """Refuse anything but finite floating point (N, C) with integers (N, 4): ValueError."""
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
    check_finite(features, "SparseTensor")


def check_batch_index(coordinates: Tensor) -> None:
    """Refuse negative batch indices, from which no number of volumes follows: ValueError."""
    if len(coordinates) and int(lowest := coordinates[:, 0].amin()) < 0:
        raise ValueError(
            f"the batch index, first in every coordinate, must be 0 or more, got {int(lowest)}; number the volumes "
            "from 0 and put [batch, i, j, k] in this order."
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


def check_refines(fine: VoxelSet, coarse: VoxelSet, stride: Sequence[int], name: str) -> None:
    """Refuse a set on a grid that is not ``stride`` times finer than that of ``coarse``.

    Args:
        fine: where results are wanted.
        coarse: where the features are.
        stride: Stride of the layer between them.
        name: Name of the fine set, for the message.

    Raises:
        InputError: extents, strides or batch sizes do not fit.
    """
    scale = tuple(size * step for size, step in zip(fine.stride, stride, strict=True))
    shape = tuple(-(-extent // step) for extent, step in zip(fine.spatial_shape, stride, strict=True))
    if (coarse.spatial_shape, coarse.stride, coarse.batch_size) != (shape, scale, fine.batch_size):
        raise InputError(
            f"a transposed convolution of stride {tuple(stride)} onto {name} (spatial_shape {fine.spatial_shape}, "
            f"stride {fine.stride}, batch_size {fine.batch_size}) takes an input of {shape}, {scale} and "
            f"{fine.batch_size}, got {coarse.spatial_shape}, {coarse.stride} and {coarse.batch_size}; use the stride "
            "of the convolution on the way down, or another target."
        )

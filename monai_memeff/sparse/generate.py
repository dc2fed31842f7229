"""Voxels that a generative transposed convolution creates."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from monai_memeff.geometry import voxels
from monai_memeff.sparse.neighbours import KernelShape, Triple
from monai_memeff.sparse.voxel_set import VoxelSet


def generate(coarse: VoxelSet, shape: KernelShape) -> VoxelSet:
    """All voxels that a transposed convolution can reach, clipped to the volume.

    The fine grid is that of the set ``coarse`` was coarsened from, when its stride fits; else ``stride`` times larger.

    Args:
        coarse: the voxels to grow from.
        shape: geometry of the transposed convolution; voxel c reaches ``stride * c - padding + dilation * t``.
    """
    grid = _finer_grid(coarse, shape.stride)
    coordinates = coarse.coordinates
    grown = [_reached_along(coordinates[:, axis + 1], axis, shape, grid) for axis in range(3)]
    _, width, depth = grid.spatial_shape
    batch = coordinates[:, 0] * grid.spatial_shape[0]
    keys = [
        ((batch + i)[inside] * width + j[inside]) * depth + k[inside]
        for (i, in_i), (j, in_j), (k, in_k) in itertools.product(*grown)
        for inside in (in_i & in_j & in_k,)
    ]
    return grid.with_keys(voxels.sorted_unique(torch.cat(keys), grid.cells))


def _reached_along(coordinate: Tensor, axis: int, shape: KernelShape, grid: VoxelSet) -> list[tuple[Tensor, Tensor]]:
    """Coordinates that every kernel point reaches along one axis, and whether they lie in the grid."""
    first = coordinate * shape.stride[axis] - shape.padding[axis]
    reached = [first + shape.dilation[axis] * point for point in range(shape.kernel_size[axis])]
    return [(c, (c >= 0) & (c < grid.spatial_shape[axis])) for c in reached]


def _finer_grid(coarse: VoxelSet, stride: Triple) -> VoxelSet:
    """A voxel set (its keys do not matter) on the grid one transposed convolution finer than ``coarse``."""
    known = coarse.finer
    if known is not None and all(f * s == c for f, s, c in zip(known.stride, stride, coarse.stride, strict=True)):
        return known
    shape = tuple(extent * step for extent, step in zip(coarse.spatial_shape, stride, strict=True))
    voxels.check_extent(shape, coarse.batch_size)
    finest = tuple(max(c // s, 1) for c, s in zip(coarse.stride, stride, strict=True))
    return VoxelSet(coarse.keys[:0], shape, coarse.batch_size, finest)

"""Voxels that a generative transposed convolution creates."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_memeff.errors import InputError
from monai_memeff.geometry import key_lists, voxels
from monai_memeff.sparse.core.neighbors import KernelShape, Triple, line_steps
from monai_memeff.sparse.core.voxel_set import VoxelSet


def generate(coarse: VoxelSet, shape: KernelShape) -> VoxelSet:
    """All voxels that a transposed convolution can reach, clipped to the volume; the coarse set keeps them.

    The fine grid is that of the set ``coarse`` was coarsened from, when its stride fits; else ``stride`` times larger.

    Args:
        coarse: the voxels to grow from.
        shape: geometry of the transposed convolution; voxel c reaches ``stride * c - padding + dilation * t``.

    Raises:
        InputError: the input's stride is not a multiple of the layer's. An input of stride 1 is refined beyond it
            (super-resolution); the finer grid then counts as stride 1.
    """
    return coarse.generated(shape, lambda: _generate(coarse, shape))


def _generate(coarse: VoxelSet, shape: KernelShape) -> VoxelSet:
    grid = _finer_grid(coarse, shape.stride)
    if _fills_whole_cells(coarse, shape, grid):
        first = voxels.regrid(coarse.keys, coarse.spatial_shape, grid.spatial_shape, shape.stride)
        keys = first[:, None] + torch.tensor(line_steps(shape, 1, grid.spatial_shape), device=first.device)
        return grid.with_keys(key_lists.sorted_unique(keys.view(-1), grid.cells))
    batch, *axes = coarse.coordinates.unbind(1)
    (i, in_i), (j, in_j), (k, in_k) = (_reached_along(c, axis, shape, grid) for axis, c in enumerate(axes))
    # A key is ((batch * H + i) * W + j) * D + k, built by broadcasting over the kernel's three axes. What falls outside
    # is masked afterwards: its key would be that of another voxel.
    height, width, depth = grid.spatial_shape
    planes = (batch * height)[:, None] + i
    lines = planes[:, :, None] * width + j[:, None]
    keys = lines[..., None] * depth + k[:, None, None]
    inside = in_i[:, :, None, None] & in_j[:, None, :, None] & in_k[:, None, None]
    return grid.with_keys(key_lists.sorted_unique(keys[inside], grid.cells))


def _fills_whole_cells(coarse: VoxelSet, shape: KernelShape, grid: VoxelSet) -> bool:
    """Whether the kernel reaches from a voxel over its own cell at most, and no cell is cut off by the border."""
    sizes = zip(coarse.spatial_shape, shape.stride, grid.spatial_shape, strict=True)
    return shape.reads_once and not any(shape.padding) and all(cells * step == extent for cells, step, extent in sizes)


def _reached_along(coordinate: Tensor, axis: int, shape: KernelShape, grid: VoxelSet) -> tuple[Tensor, Tensor]:
    """(N, kernel size) coordinates that the kernel reaches along one axis, and whether they lie in the grid."""
    points = torch.arange(shape.kernel_size[axis], device=coordinate.device) * shape.dilation[axis]
    reached = (coordinate * shape.stride[axis] - shape.padding[axis])[:, None] + points
    return reached, (reached >= 0) & (reached < grid.spatial_shape[axis])


def _finer_grid(coarse: VoxelSet, stride: Triple) -> VoxelSet:
    """A voxel set (its keys do not matter) on the grid one transposed convolution finer than ``coarse``."""
    known = coarse.finer
    if known is not None and all(f * s == c for f, s, c in zip(known.stride, stride, coarse.stride, strict=True)):
        return known
    if any(c > 1 and c % s for c, s in zip(coarse.stride, stride, strict=True)):
        raise InputError(
            f"a generative convolution of stride {stride} refines inputs whose stride is a multiple of it, or 1, got "
            f"{coarse.stride}; use the strides of the way down, in reverse order."
        )
    shape = tuple(extent * step for extent, step in zip(coarse.spatial_shape, stride, strict=True))
    voxels.check_extent(shape, coarse.batch_size)
    finest = tuple(max(c // s, 1) for c, s in zip(coarse.stride, stride, strict=True))
    return VoxelSet(coarse.keys[:0], shape, coarse.batch_size, finest)

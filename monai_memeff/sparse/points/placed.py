"""Voxels whose grid may begin anywhere: coordinates below zero are shifted onto a grid, and given back."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_memeff.geometry import voxels
from monai_memeff.sparse.core.tensor import SparseTensor
from monai_memeff.sparse.core.voxel_set import VoxelSet

ALIGNMENT = 64
"""The grid begins at a multiple of this, so that cells coarsened up to 64-fold are those of the unshifted lattice."""

Origin = tuple[int, int, int]


class PlacedVoxelSet(VoxelSet):
    """A voxel set on a grid that begins at ``origin`` instead of zero; sets made from it know where they are.

    Args:
        keys: see :class:`VoxelSet`, on the shifted grid.
        spatial_shape: see :class:`VoxelSet`.
        batch_size: see :class:`VoxelSet`.
        origin: the user's coordinates of the grid's first voxel.
    """

    def __init__(self, keys: Tensor, spatial_shape: tuple[int, int, int], batch_size: int, origin: Origin) -> None:
        super().__init__(keys, spatial_shape, batch_size)
        self.origin = origin

    def select(self, keep: Tensor) -> VoxelSet:
        """The subset marked by an (N,) boolean mask."""
        return self.with_keys(self.keys[keep])

    def with_keys(self, keys: Tensor) -> VoxelSet:
        """Another set of voxels on the same grid; ``keys`` must be strictly increasing."""
        return PlacedVoxelSet(keys, self.spatial_shape, self.batch_size, self.origin)


def place(features: Tensor, coordinates: Tensor, batch: Tensor) -> SparseTensor:
    """Features on voxels with any integer coordinates, negative ones included.

    Args:
        features: (N, C) floating point.
        coordinates: (N, 3) integers, unique within each item.
        batch: (N,) integers.

    Returns:
        The tensor on a grid whose first voxel is a multiple of 64 along each axis.

    Raises:
        ValueError: shapes or dtypes do not fit, two rows share a voxel, or the span exceeds 2^18 along an axis.
    """
    origin, shape = _grid_around(coordinates)
    shifted = coordinates.to(torch.int64) - torch.tensor(origin, device=coordinates.device)
    rows = torch.cat((batch[:, None].to(shifted), shifted), dim=1)
    sparse = SparseTensor(features, rows, shape)
    return SparseTensor.on(PlacedVoxelSet(sparse.voxels.keys, shape, sparse.batch_size, origin), sparse.features)


def origin_of(x: SparseTensor) -> Origin:
    """Where the grid of a tensor begins, in the user's coordinates of the finest level.

    Args:
        x: made by ``points.nn.SparseTensor`` or :func:`to_sparse_tensor`, or by layers from such a tensor.

    Raises:
        ValueError: the tensor does not come from one with an origin.

    Examples:
        >>> origin_of(nn.SparseTensor(torch.ones(1, 8), torch.tensor([[-1, 0, 70]])))  # multiples of 64
        (-64, 0, 64)
    """
    level: VoxelSet | None = x.voxels
    while level is not None:
        if isinstance(level, PlacedVoxelSet):
            return level.origin
        level = level.finer
    raise ValueError(
        "this SparseTensor has no origin: it was not made from points, or was moved by .to(device) since; build it "
        "with points.nn.SparseTensor or to_sparse_tensor, on the device where it is used."
    )


def placed_coordinates(x: SparseTensor) -> Tensor:
    """(N, 4) int64 [batch, i, j, k] in the user's coordinates of the finest level, negative ones included.

    After a stride they are multiples of the stride: the first voxel of every cell, as MinkowskiEngine counts them.

    Args:
        x: made by ``points.nn.SparseTensor`` or :func:`to_sparse_tensor`, or by layers from such a tensor.

    Raises:
        ValueError: the tensor does not come from one with an origin.

    Examples:
        >>> placed_coordinates(nn.SparseTensor(torch.ones(1, 8), torch.tensor([[-1, 0, 70]])))
        tensor([[ 0, -1,  0, 70]])
    """
    origin = torch.tensor((0, *origin_of(x)), device=x.device)
    return x.coordinates * torch.tensor((1, *x.stride), device=x.device) + origin


def rows_at(x: SparseTensor, coordinates: Tensor, batch: Tensor) -> Tensor:
    """(M,) int64, the rows of ``x`` that hold the given user's coordinates; len(x) where the voxel is not active.

    Args:
        x: made by ``points.nn.SparseTensor`` or :func:`to_sparse_tensor`, or by layers from such a tensor.
        coordinates: (M, 3) integers of the finest level; at a coarser one, the cell that holds them is looked up.
        batch: (M,) integers.
    """
    origin, stride = (torch.tensor(t, device=x.device) for t in (origin_of(x), x.stride))
    cell = (coordinates.to(x.device, torch.int64) - origin).div(stride, rounding_mode="floor")
    batch = batch.to(x.device, torch.int64)
    shape = torch.tensor(x.spatial_shape, device=x.device)
    inside = ((cell >= 0) & (cell < shape)).all(dim=1) & (batch >= 0) & (batch < x.batch_size)
    found = torch.full((len(cell),), len(x), dtype=torch.int64, device=x.device)
    wanted = torch.cat((batch[:, None], cell), dim=1)[inside]
    keys, known = voxels.coordinates_to_keys(wanted, x.spatial_shape), x.voxels.keys
    if len(known):
        row = torch.searchsorted(known, keys).clamp_(max=len(known) - 1)
        found[inside] = torch.where(known[row] == keys, row, len(known))
    return found


def _grid_around(coordinates: Tensor) -> tuple[Origin, tuple[int, int, int]]:
    integral = not (coordinates.is_floating_point() or coordinates.is_complex() or coordinates.dtype == torch.bool)
    if coordinates.ndim != 2 or coordinates.shape[1] != 3 or not integral:
        raise ValueError(
            f"coordinates must be integers of shape (N, 3), got {coordinates.dtype} of {tuple(coordinates.shape)}; "
            "use GridSampling3D(size, quantize_coords=True), which sets coords."
        )
    if len(coordinates) == 0:
        return (0, 0, 0), (1, 1, 1)
    coordinates = coordinates.to(torch.int64)
    low = coordinates.amin(0).div(ALIGNMENT, rounding_mode="floor") * ALIGNMENT
    high = coordinates.amax(0)
    i, j, k = low.tolist()
    height, width, depth = (high - low + 1).tolist()
    return (i, j, k), (height, width, depth)

"""Kernel maps: which input voxel meets which output voxel under which kernel weight, planned apart from the weights.

Alignment is that of ``torch.nn.Conv3d``: output voxel ``o`` reads input voxels ``stride * o - padding + dilation * t``
for ``t = 0 ... kernel_size - 1`` along each axis, and kernel offsets are numbered with the last axis fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from monai_memeff.geometry import voxels
from monai_memeff.sparse.voxel_set import VoxelSet

Triple = tuple[int, int, int]

PAIR_COST = 3
"""Measured cost of scattering one pair, in units of gathering one table entry: decides between the two layouts."""


PLANNING_ROWS = 2**15
"""Output rows whose neighbours are looked up at a time: bounds what planning needs beside the map itself."""


@dataclass(frozen=True)
class KernelShape:
    """The geometry of one convolution: kernel size, stride, dilation and padding along (i, j, k)."""

    kernel_size: Triple
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)

    @property
    def volume(self) -> int:
        """Number of kernel offsets."""
        return self.kernel_size[0] * self.kernel_size[1] * self.kernel_size[2]

    @property
    def is_symmetric(self) -> bool:
        """Whether offset t mirrors offset volume - 1 - t, so that the map is its own transpose with flipped weights."""
        reach = ((d * (k - 1), 2 * p) for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True))
        return self.stride == (1, 1, 1) and all(span == twice_padding for span, twice_padding in reach)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is a single weight at offset zero and stride one."""
        return self.volume == 1 and self.stride == (1, 1, 1) and self.padding == (0, 0, 0)


@dataclass(eq=False)
class KernelMap:
    """Pairs (input row, output row) of every kernel offset, in the layout that is cheaper to run.

    Exactly one of the two layouts is held:

    * ``table``: (planes, num_out, offsets per plane) int32, the input row of every output row and offset, ``num_in``
      where there is none. Dense maps: submanifold and strided convolutions.
    * ``pairs``: per offset the input rows and the output rows, int64 and increasing. Sparse maps: transposed ones.

    Attributes:
        num_in: rows of the input.
        num_out: rows of the output.
        num_offsets: kernel offsets.
        num_pairs: (input, output) pairs over all offsets.
        flipped: offset t of the weights is applied as offset num_offsets - 1 - t.
    """

    num_in: int
    num_out: int
    num_offsets: int
    num_pairs: int
    table: Tensor | None = None
    pairs: list[tuple[Tensor, Tensor]] | None = None
    flipped: bool = False
    symmetric: bool = field(default=False, repr=False)

    @cached_property
    def transposed(self) -> KernelMap:
        """The map from the outputs back to the inputs: the adjoint's geometry."""
        if self.symmetric:  # the same table read with flipped weights
            return replace(self, flipped=not self.flipped)
        swapped = [(out_rows, in_rows) for in_rows, out_rows in self.each_pair()]
        return _choose_layout(swapped, self.num_out, self.num_in, self._offsets_per_plane())

    def each_pair(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (input rows, output rows) of every offset."""
        if self.pairs is not None:
            yield from self.pairs
            return
        assert self.table is not None
        for rows in self.table.transpose(1, 2).flatten(0, 1):
            out_rows = (rows < self.num_in).nonzero()[:, 0]
            yield rows[out_rows].long(), out_rows

    def _offsets_per_plane(self) -> int:
        return self.table.shape[2] if self.table is not None else self.num_offsets


def plan_kernel_map(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> KernelMap:
    """Plan a convolution from one voxel set to another.

    Args:
        inputs: where the features are.
        outputs: where the results are wanted; the grid is coarser by ``shape.stride``.
        shape: geometry of the convolution.

    Returns:
        The map, in the cheaper of its two layouts.
    """
    table = _neighbour_table(inputs, outputs, shape)
    num_pairs = int((table < len(inputs)).count_nonzero())
    symmetric = shape.is_symmetric and inputs is outputs
    dense = KernelMap(len(inputs), len(outputs), shape.volume, num_pairs, table, symmetric=symmetric)
    if symmetric or PAIR_COST * num_pairs >= table.numel():
        return dense
    return KernelMap(len(inputs), len(outputs), shape.volume, num_pairs, pairs=list(dense.each_pair()))


def _neighbour_table(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> Tensor:
    """(planes, num_out, offsets per plane) int32 input rows, ``len(inputs)`` where there is none.

    Keys are taken on a grid grown by everything the kernel can reach, so that a step over the border meets an empty
    cell instead of the next line, and every offset is one number added to a key.
    """
    extents, margins = _reachable_grid(inputs, outputs, shape)
    cells = inputs.batch_size * extents[0] * extents[1] * extents[2]
    if cells > voxels.MAX_KEY:
        raise ValueError(
            f"batch_size * voxels in the kernel's reach must be at most 2^63 - 1, got {inputs.batch_size} * {extents}; "
            "use a smaller batch, kernel or dilation."
        )
    grown = voxels.regrid(inputs.keys, inputs.spatial_shape, extents, shift=margins)
    look_up = voxels.RowLookup(grown, cells)
    first = voxels.regrid(outputs.keys, outputs.spatial_shape, extents, shape.stride)[:, None]
    j, k = (torch.arange(size, device=inputs.device) for size in shape.kernel_size[1:])
    plane_steps = (j[:, None] * shape.dilation[1] * extents[2] + k * shape.dilation[2]).flatten()
    planes, per_plane = shape.kernel_size[0], len(plane_steps)
    table = torch.empty((planes, len(outputs), per_plane), dtype=torch.int32, device=inputs.device)
    for plane in range(planes):
        steps = plane_steps + plane * shape.dilation[0] * extents[1] * extents[2]
        for start in range(0, len(outputs), PLANNING_ROWS):
            rows = slice(start, start + PLANNING_ROWS)
            look_up(first[rows] + steps, out=table[plane, rows])
    return table


def _reachable_grid(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> tuple[Triple, Triple]:
    """Extents that hold every voxel the kernel reads, and where the input grid starts in them."""
    last = [
        step * (extent - 1) + spread * (size - 1) + 1
        for step, extent, spread, size in zip(
            shape.stride, outputs.spatial_shape, shape.dilation, shape.kernel_size, strict=True
        )
    ]
    i, j, k = (max(e, n + p) for e, n, p in zip(last, inputs.spatial_shape, shape.padding, strict=True))
    return (i, j, k), shape.padding


def _choose_layout(pairs: list[tuple[Tensor, Tensor]], num_in: int, num_out: int, plane: int) -> KernelMap:
    num_pairs = sum(in_rows.numel() for in_rows, _ in pairs)
    if PAIR_COST * num_pairs < len(pairs) * num_out:
        return KernelMap(num_in, num_out, len(pairs), num_pairs, pairs=pairs)
    device = pairs[0][0].device
    table = torch.full((len(pairs) // plane, num_out, plane), num_in, dtype=torch.int32, device=device)
    for offset, (in_rows, out_rows) in enumerate(pairs):
        table[offset // plane, out_rows, offset % plane] = in_rows.int()
    return KernelMap(num_in, num_out, len(pairs), num_pairs, table)


def kernel_map_between(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> KernelMap:
    """The kernel map from ``inputs`` to ``outputs``, planned once where one set keeps it.

    A set keeps the maps within itself (submanifold convolutions) and those from the finer set it was coarsened from;
    the ``transposed`` of the latter serve the way back.
    """
    if inputs is outputs:
        return inputs.planned(("within", shape), lambda: plan_kernel_map(inputs, inputs, shape))
    if outputs.finer is inputs:
        return outputs.planned(("finer", shape), lambda: plan_kernel_map(inputs, outputs, shape))
    return plan_kernel_map(inputs, outputs, shape)


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

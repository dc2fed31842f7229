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

LOOKUP_SPAN = 16
"""A dense look-up table is used while it has at most this many entries per voxel; else the keys are searched."""


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
    plane = shape.kernel_size[1] * shape.kernel_size[2]
    symmetric = shape.is_symmetric and inputs is outputs
    table = torch.full((shape.volume, len(outputs)), len(inputs), dtype=torch.int32, device=outputs.device)
    own_rows = torch.arange(len(outputs), dtype=torch.int32, device=outputs.device) if symmetric else None
    for offset, rows in _rows_per_offset(inputs, outputs, shape, half=symmetric):
        table[offset] = rows
        if own_rows is not None:
            met = rows < len(inputs)
            table[shape.volume - 1 - offset, rows[met].long()] = own_rows[met]
    if own_rows is not None and shape.volume % 2:
        table[shape.volume // 2] = own_rows
    num_pairs = int((table < len(inputs)).sum())
    planes = table.view(shape.kernel_size[0], plane, -1)
    if not symmetric and PAIR_COST * num_pairs < table.numel():
        dense = KernelMap(len(inputs), len(outputs), shape.volume, num_pairs, planes.transpose(1, 2))
        return KernelMap(len(inputs), len(outputs), shape.volume, num_pairs, pairs=list(dense.each_pair()))
    planes = planes.transpose(1, 2).contiguous()
    return KernelMap(len(inputs), len(outputs), shape.volume, num_pairs, planes, symmetric=symmetric)


def _choose_layout(pairs: list[tuple[Tensor, Tensor]], num_in: int, num_out: int, plane: int) -> KernelMap:
    num_pairs = sum(in_rows.numel() for in_rows, _ in pairs)
    if PAIR_COST * num_pairs < len(pairs) * num_out:
        return KernelMap(num_in, num_out, len(pairs), num_pairs, pairs=pairs)
    device = pairs[0][0].device
    table = torch.full((len(pairs) // plane, num_out, plane), num_in, dtype=torch.int32, device=device)
    for offset, (in_rows, out_rows) in enumerate(pairs):
        table[offset // plane, out_rows, offset % plane] = in_rows.int()
    return KernelMap(num_in, num_out, len(pairs), num_pairs, table)


def _rows_per_offset(
    inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape, half: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield (offset, input row of every output voxel or ``len(inputs)``), for the first half of the offsets or all."""
    batch, *first = _first_reads(outputs, shape)
    look_up = _Lookup(inputs)
    _, width, depth = inputs.spatial_shape
    stop = shape.volume // 2 if half else shape.volume
    offsets = itertools.product(*(range(size) for size in shape.kernel_size))
    line: tuple[int, int] | None = None
    for number, (ti, tj, tk) in enumerate(itertools.islice(offsets, stop)):
        if line != (ti, tj):
            line = (ti, tj)
            i, j = first[0] + shape.dilation[0] * ti, first[1] + shape.dilation[1] * tj
            in_plane = (i >= 0) & (i < inputs.spatial_shape[0]) & (j >= 0) & (j < width)
            line_keys = ((batch * inputs.spatial_shape[0] + i) * width + j) * depth + first[2]
        k = first[2] + shape.dilation[2] * tk
        valid = in_plane & (k >= 0) & (k < depth)
        yield number, look_up(line_keys + shape.dilation[2] * tk, valid)


def _first_reads(outputs: VoxelSet, shape: KernelShape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch index and the input coordinates that offset 0 reads, for every output voxel."""
    batch, *spatial = outputs.coordinates.unbind(1)
    i, j, k = (c * step - pad for c, step, pad in zip(spatial, shape.stride, shape.padding, strict=True))
    return batch, i, j, k


class _Lookup:
    """Row of a key in a voxel set: through a dense table while that is small, else by binary search."""

    def __init__(self, inputs: VoxelSet) -> None:
        self.keys = inputs.keys
        self.absent = len(inputs)
        height, width, depth = inputs.spatial_shape
        cells = inputs.batch_size * height * width * depth
        self.rows: Tensor | None = None
        if cells <= LOOKUP_SPAN * max(len(inputs), 2**16):
            self.rows = torch.full((cells,), self.absent, dtype=torch.int32, device=self.keys.device)
            self.rows[self.keys] = torch.arange(self.absent, dtype=torch.int32, device=self.keys.device)

    def __call__(self, queries: Tensor, valid: Tensor) -> Tensor:
        """(M,) keys and whether they are meant to (M,) int32 rows, ``absent`` where there is none."""
        if self.rows is not None:
            return torch.where(valid, self.rows[queries * valid], self.absent)
        found = voxels.find(self.keys, queries)
        return torch.where(valid & (found >= 0), found, self.absent).int()


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
    steps = [torch.arange(size, device=coarse.device) for size in shape.kernel_size]
    kernel = torch.cartesian_prod(*steps).view(-1, 3)
    geometry = [torch.tensor(values, device=coarse.device) for values in (shape.dilation, shape.padding, shape.stride)]
    reach = kernel * geometry[0] - geometry[1]
    keys = []
    for offset in reach:
        reached = coarse.coordinates
        reached[:, 1:] = reached[:, 1:] * geometry[2] + offset
        reached = reached[voxels.inside(reached, grid.spatial_shape)]
        keys.append(voxels.coordinates_to_keys(reached, grid.spatial_shape))
    return grid.with_keys(torch.unique(torch.cat(keys)))


def _finer_grid(coarse: VoxelSet, stride: Triple) -> VoxelSet:
    """A voxel set (its keys do not matter) on the grid one transposed convolution finer than ``coarse``."""
    known = coarse.finer
    if known is not None and all(f * s == c for f, s, c in zip(known.stride, stride, coarse.stride, strict=True)):
        return known
    shape = tuple(extent * step for extent, step in zip(coarse.spatial_shape, stride, strict=True))
    voxels.check_extent(shape, coarse.batch_size)
    finest = tuple(max(c // s, 1) for c, s in zip(coarse.stride, stride, strict=True))
    return VoxelSet(coarse.keys[:0], shape, coarse.batch_size, finest)

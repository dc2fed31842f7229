"""Kernel maps: which input voxel meets which output voxel under which kernel weight, planned apart from the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from monai_memeff.sparse.core.map_cache import load_cached
from monai_memeff.sparse.core.neighbors import KernelShape, NeighborTable, plan_neighbors
from monai_memeff.sparse.core.voxel_set import VoxelSet

PAIR_COST = 3
"""Measured cost of scattering one pair, in units of gathering one table entry: decides between two layouts."""

SMALL_TABLE = 2**15
"""Entries of a table that is gathered at once, faster than any number of offsets one by one."""


@dataclass(eq=False)
class KernelMap:
    """Pairs (input row, output row) of every kernel offset, in the layout that is cheapest to run.

    Exactly one of two layouts is held:

    * ``table``: with ``scatters`` False the inputs of every output row, to be gathered (submanifold and strided
      convolutions); with ``scatters`` True the one output of every input row and offset, to be written (transposed
      convolutions whose kernel is no larger than the stride).
    * ``pairs``: per offset the input rows and the output rows, int32 and increasing (other transposed convolutions).

    Attributes:
        num_in: rows of the input.
        num_out: rows of the output.
        num_offsets: kernel offsets.
        flipped: offset t of the weights is applied as offset num_offsets - 1 - t.
        symmetric: the map is its own transpose with flipped weights.
        reads_once: no row takes part in two pairs on the finer side.
    """

    num_in: int
    num_out: int
    num_offsets: int
    table: NeighborTable | None = None
    pairs: list[tuple[Tensor, Tensor]] | None = None
    scatters: bool = False
    flipped: bool = False
    symmetric: bool = field(default=False, repr=False)
    reads_once: bool = field(default=False, repr=False)

    @cached_property
    def transposed(self) -> KernelMap:
        """The map from the outputs back to the inputs: the adjoint's geometry."""
        if self.symmetric:  # the same table read with flipped weights
            return replace(self, flipped=not self.flipped)
        if self.reads_once and self.table is not None:  # the same table read the other way
            return replace(self, num_in=self.num_out, num_out=self.num_in, scatters=not self.scatters)
        swapped = [(out_rows, in_rows) for in_rows, out_rows in self.each_pair()]
        return _choose_layout(swapped, self.num_out, self.num_in)

    def each_pair(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (input rows, output rows) of every offset, int32."""
        if self.pairs is not None:
            yield from self.pairs
            return
        assert self.table is not None
        far, near = (self.num_out, self.num_in) if self.scatters else (self.num_in, self.num_out)
        rows = self.table.rows(far)
        present = rows < far
        numbers = torch.arange(near, dtype=torch.int32, device=rows.device).expand_as(rows)
        counts = present.sum(1).tolist()
        for found in zip(rows[present].split(counts), numbers[present].split(counts), strict=True):
            yield found[::-1] if self.scatters else found

    def neighbor_rows(self) -> Tensor:
        """(num_offsets, num_out) int32: the input row of every output row and offset, ``num_in`` where there is none.

        The layout that output-stationary engines want, made anew at each call; the offsets are in the order of the
        weights as the caller holds them, ``flipped`` or not.
        """
        if self.table is not None and self.scatters:
            rows = self._written_rows(self.table.rows(self.num_out))
        elif self.table is not None:
            rows = self.table.rows(self.num_in)
        else:
            some = next(self.each_pair())[0]
            rows = torch.full((self.num_offsets, self.num_out), self.num_in, dtype=torch.int32, device=some.device)
            for offset, (in_rows, out_rows) in enumerate(self.each_pair()):
                rows[offset, out_rows.long()] = in_rows
        return rows.flip(0) if self.flipped else rows

    def _written_rows(self, places: Tensor) -> Tensor:
        """(num_offsets, num_in) output rows, ``num_out`` where there is none -> the other way round."""
        numbers = torch.arange(self.num_in, dtype=torch.int32, device=places.device).expand_as(places)
        rows = numbers.new_full((self.num_offsets, self.num_out + 1), self.num_in)  # the last takes what has no place
        return rows.scatter_(1, places.long(), numbers)[:, :-1].contiguous()

    @cached_property
    def num_pairs(self) -> int:
        """(input, output) pairs over all offsets."""
        return sum(in_rows.numel() for in_rows, _ in self.each_pair())


@dataclass(frozen=True, eq=False)
class ConvolutionGeometry:
    """One convolution without its weights, as engines receive it: two voxel sets and the kernel's shape.

    Attributes:
        inputs: where the features are.
        outputs: where the results are wanted.
        shape: geometry of the kernel; alignment as in :mod:`monai_memeff.sparse.core.neighbors`, read from the coarse
            to the fine side if ``transposed``.
        transposed: the adjoint of a convolution from ``outputs`` to ``inputs``.
    """

    inputs: VoxelSet
    outputs: VoxelSet
    shape: KernelShape
    transposed: bool = False

    @property
    def down(self) -> KernelMap:
        """The map from the finer side to the coarser one, planned once where one of the voxel sets keeps it."""
        fine, coarse = (self.outputs, self.inputs) if self.transposed else (self.inputs, self.outputs)
        return kernel_map_between(fine, coarse, self.shape)

    @property
    def kernel_map(self) -> KernelMap:
        """The pairs of rows, in the convolution's own direction."""
        return self.down.transposed if self.transposed else self.down


def plan_kernel_map(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> KernelMap:
    """Plan a convolution from one voxel set to another.

    Args:
        inputs: where the features are.
        outputs: where the results are wanted; the grid is coarser by ``shape.stride``.
        shape: geometry of the convolution.
    """
    return KernelMap(
        len(inputs),
        len(outputs),
        shape.volume,
        load_cached(inputs, outputs, shape, lambda: plan_neighbors(inputs, outputs, shape)),
        symmetric=shape.is_symmetric and inputs is outputs,
        reads_once=shape.reads_once,
    )


def _choose_layout(pairs: list[tuple[Tensor, Tensor]], num_in: int, num_out: int) -> KernelMap:
    num_pairs = sum(in_rows.numel() for in_rows, _ in pairs)
    if len(pairs) * num_out > SMALL_TABLE and PAIR_COST * num_pairs < len(pairs) * num_out:
        return KernelMap(num_in, num_out, len(pairs), pairs=pairs)
    device = pairs[0][0].device
    entries = torch.full((num_out, len(pairs)), num_in, dtype=torch.int32, device=device)
    in_rows, out_rows = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    # Dense table of the few rows: entry (output row, offset) is the input row, num_in where the pair does not exist;
    # the pairs come offset by offset, so their offsets are runs of one value.
    counts = torch.tensor([rows.numel() for rows, _ in pairs], device=device)
    offsets = torch.arange(len(pairs), device=device).repeat_interleave(counts)
    entries[out_rows.long(), offsets] = in_rows
    return KernelMap(num_in, num_out, len(pairs), NeighborTable(entries, 1, None, num_in))


def kernel_map_between(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> KernelMap:
    """The kernel map from ``inputs`` to ``outputs``, planned once where one set keeps it.

    A set keeps the maps within itself (submanifold convolutions) and those from the finer set that it was coarsened
    from or that was generated from it; the ``transposed`` of the latter serve transposed convolutions.
    """
    if inputs is outputs:
        return inputs.planned(("within", shape), lambda: plan_kernel_map(inputs, inputs, shape))
    # The coarse set keeps the map in both cases, under the finer set's part in its making: one plan serves the
    # convolution down to it and, transposed, the one up again.
    origin = outputs.finer is inputs
    if origin or outputs.has_generated(inputs):
        return outputs.planned(("finer", shape, origin), lambda: plan_kernel_map(inputs, outputs, shape))
    return plan_kernel_map(inputs, outputs, shape)

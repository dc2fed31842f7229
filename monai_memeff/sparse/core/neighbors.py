"""Neighbor tables: where the input rows of every output voxel stand, one number for each line of the kernel.

Alignment is that of ``torch.nn.Conv3d``: output voxel ``o`` reads input voxels ``stride * o - padding + dilation * t``
for ``t = 0 ... kernel_size - 1`` along each axis, and kernel offsets are numbered with the last axis fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from monai_memeff.geometry import key_lists, voxels
from monai_memeff.sparse.core.voxel_set import VoxelSet

Triple = tuple[int, int, int]

MAX_SLOTS = 2**31 - 2**8
"""Slots are numbered by 32-bit integers."""

FULL_SPAN = 4
"""A grid of at most this many cells for each input voxel is filled up: every cell is a slot, nothing is looked up."""

FULL_CELLS = 2**9
"""So is one of no more cells than these."""


@dataclass(frozen=True)
class KernelShape:
    """The geometry of one convolution: kernel size, stride, dilation and padding along (i, j, k)."""

    kernel_size: Triple
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)

    @cached_property
    def volume(self) -> int:
        """Number of kernel offsets."""
        return self.kernel_size[0] * self.kernel_size[1] * self.kernel_size[2]

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether offset t mirrors offset volume - 1 - t, so that the map is its own transpose with flipped weights."""
        reach = ((d * (k - 1), 2 * p) for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True))
        return self.stride == (1, 1, 1) and all(span == twice_padding for span, twice_padding in reach)

    @cached_property
    def is_pointwise(self) -> bool:
        """Whether the kernel is a single weight at offset zero and stride one."""
        return self.volume == 1 and self.stride == (1, 1, 1) and self.padding == (0, 0, 0)

    @cached_property
    def reads_once(self) -> bool:
        """Whether no input voxel is read by two outputs, nor twice by one."""
        return all(d * (k - 1) < s for k, d, s in zip(self.kernel_size, self.dilation, self.stride, strict=True))


@dataclass(eq=False)
class NeighborTable:
    """Input rows of every output row, found by one number for each line of the kernel along k.

    Voxels that follow each other along k are neighbors in memory too, as rows are in lexicographic order. With zeros
    put into the gaps between them (as many as the kernel can see), the rows that a line of the kernel reads lie in one
    window of ``window`` rows, absent ones included. The table names where each window starts: for a 3^3 kernel 9
    numbers instead of 27, and a gathered window is one piece of memory.

    Attributes:
        entries: (num_out, lines) int32, starts of windows among the slots, lines in the order of the weights.
        window: rows in a window: the kernel's size along k, or 1 where voxels are named one by one.
        slots: (num_in,) int32, where each input row stands when there are zeros between them; None: row n in slot n.
        absent: start of the window without any voxel; the slots end ``window`` after it.
    """

    entries: Tensor
    window: int
    slots: Tensor | None
    absent: int

    def windows(self, features: Tensor) -> Tensor:
        """Every window of the rows: (num_in, C) -> (absent + 1, window * C), overlapping views of one buffer."""
        if self.slots is None:
            buffer = torch.cat((features, features.new_zeros(self.window, features.shape[1])))
        else:
            buffer = features.new_zeros(self.absent + self.window, features.shape[1])
            buffer.index_copy_(0, self.slots.long(), features)
        # Window n is the rows n ... n + window - 1 of the buffer, which are one piece of memory: a view whose step is
        # one row overlaps its neighbors and copies nothing.
        return buffer.as_strided((self.absent + 1, self.window * features.shape[1]), (features.shape[1], 1))

    def summed(self, parts: Tensor, num_in: int) -> Tensor:
        """The adjoint of reading every window: (num_out * num_offsets, C) -> (num_in, C), each part added to its row.

        Args:
            parts: for every output row the offsets in the order of the weights; what belongs to absent rows is dropped.
            num_in: rows of the input.
        """
        places = self.entries if self.window == 1 else self._places()
        # Slots without a row, and the absent window at the end, take what has no place.
        total = parts.new_zeros(self.absent + self.window, parts.shape[1]).index_add_(0, places.view(-1), parts)
        return total[:num_in] if self.slots is None else total.index_select(0, self.slots)

    def _places(self) -> Tensor:
        """(num_out, lines, window) int32 slots that the windows reach."""
        return self.entries[:, :, None] + torch.arange(self.window, dtype=torch.int32, device=self.entries.device)

    def rows(self, num_in: int) -> Tensor:
        """(num_offsets, num_out) int32 input rows, ``num_in`` where there is none."""
        if self.slots is None:
            return self.entries.t().contiguous()
        # The inverse of `slots`: which input row stands in a slot. Slots of zeros hold num_in, "no row", so a window
        # read from here names its rows, absent ones included.
        row_at = self.entries.new_full((self.absent + self.window,), num_in)
        row_at[self.slots.long()] = torch.arange(num_in, dtype=torch.int32, device=row_at.device)
        places = self._places().flatten(1).t()
        return row_at.index_select(0, places.flatten()).view(places.shape)


def plan_neighbors(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> NeighborTable:
    """Find the neighbors of every output voxel.

    Keys are taken on a grid grown by everything the kernel can reach, so that a step over the border meets an empty
    cell instead of the next line, and every offset is one number added to a key.

    Raises:
        ValueError: the grown grid has more cells than 64-bit keys can number, or there are more input voxels than
            32-bit slots can.
    """
    extents, margins = _reachable_grid(inputs, outputs, shape)
    cells = inputs.batch_size * extents[0] * extents[1] * extents[2]
    if cells > voxels.MAX_KEY:
        raise ValueError(
            f"batch_size * voxels in the kernel's reach must be at most 2^63 - 1, got {inputs.batch_size} * {extents}; "
            "use a smaller batch, kernel or dilation."
        )
    window = shape.kernel_size[2] if shape.dilation[2] == 1 and not shape.reads_once else 1
    if len(inputs) * window > MAX_SLOTS:
        raise ValueError(
            f"a convolution takes at most {MAX_SLOTS // window} voxels with a kernel of {shape.kernel_size}, got "
            f"{len(inputs)}; use a smaller batch, or crop the volume."
        )
    grown = voxels.regrid(inputs.keys, inputs.spatial_shape, extents, shift=margins)
    # On the grown grid a key plus a fixed step is the key of the neighbor, even across a border: the margin holds no
    # voxels. So one search per line of the kernel and output is enough.
    if inputs is outputs:  # the kernel begins a fixed step before the voxel itself
        first = grown - ((margins[0] * extents[1] + margins[1]) * extents[2] + margins[2])
    else:
        first = voxels.regrid(outputs.keys, outputs.spatial_shape, extents, shape.stride)
    steps = line_steps(shape, window, extents)
    if window > 1 and cells <= max(FULL_SPAN * len(inputs), FULL_CELLS):  # cells are slots: windows start at their keys
        entries = first[:, None] + torch.tensor(steps, device=first.device)
        return NeighborTable(entries.to(torch.int32), window, grown.to(torch.int32), cells)
    slots, absent = _slots(grown, window)
    entries = key_lists.look_up(grown, first, steps, slots, absent, window, cells)
    return NeighborTable(entries, window, slots, absent)


def line_steps(shape: KernelShape, window: int, extents: Triple) -> list[int]:
    """What is added to the key of an output's first offset for each of the kernel's lines, in the weights' order."""
    sizes = (*shape.kernel_size[:2], shape.kernel_size[2] // window)
    pitches = (extents[1] * extents[2], extents[2], 1)
    points = (
        [point * spread * pitch for point in range(size)]
        for size, spread, pitch in zip(sizes, shape.dilation, pitches, strict=True)
    )
    return [sum(point) for point in product(*points)]


def _slots(keys: Tensor, window: int) -> tuple[Tensor | None, int]:
    """Where rows stand with zeros in the gaps along k, int32, and the first slot after them: see NeighborTable."""
    if window == 1:
        return None, len(keys)
    if len(keys) == 0:  # windows all the same: a table of them has one entry for each line, not for each offset
        return keys.to(torch.int32), 0
    # Rows whose keys differ by d stand min(d, window) slots apart: a window never reaches over more, and so the slots
    # are at most `window` times as many as the rows, however sparse the volume is.
    steps = keys.diff(prepend=keys[:1] - window).clamp_(max=window)
    slots = steps.cumsum_(0).sub_(1).to(torch.int32)
    return slots, int(slots[-1]) + 1


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

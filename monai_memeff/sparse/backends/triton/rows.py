"""Where every output row finds its input rows, sorted so that neighboring rows use the same kernel offsets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from monai_memeff.sparse.core.kernel_map import KernelMap, NeighborTable
from monai_memeff.sparse.core.offset_masks import offset_masks

SORT_BITS = 62
"""Bits of the number by which rows are sorted; larger kernels let several offsets share a bit."""


@dataclass(eq=False)
class Tiles:
    """Which offsets occur in which tile of consecutive sorted rows: (num_offsets, num_tiles) boolean ``occurs``.

    Either side's lists are made when they are first read: the convolution reads one, the gradient of weights the other.
    """

    occurs: Tensor

    @cached_property
    def of_tile(self) -> tuple[Tensor, Tensor]:
        """(num_tiles, num_offsets) int32, a tile's offsets first, increasing; and (num_tiles,) how many they are."""
        return _listed(self.occurs.t())

    @cached_property
    def of_offset(self) -> tuple[Tensor, Tensor]:
        """(num_offsets, num_tiles) int32, the tiles of an offset first, increasing; and (num_offsets,) their number."""
        return _listed(self.occurs)

    def __len__(self) -> int:
        return self.occurs.shape[1]


@dataclass(eq=False)
class RowPlan:
    """The neighbor table of one kernel map in sorted order.

    Rows that use the same set of offsets stand together, so a tile of rows skips most offsets that it does not use: one
    of eight is left of a transposed 2^3 kernel.

    Attributes:
        table: (num_offsets, num_out) int32 input rows, ``num_in`` where there is none; columns in sorted order.
        order: (num_out,) int32, the output row of every column; equal sets keep the order of the rows.
        num_in: rows of the input.
    """

    table: Tensor
    order: Tensor
    num_in: int
    _tiles: dict[int, Tiles] = field(default_factory=dict, repr=False)

    def tiles(self, rows: int) -> Tiles:
        """What occurs in tiles of ``rows`` rows, found at the first call."""
        if rows not in self._tiles:
            self._tiles[rows] = self._find_tiles(rows)
        return self._tiles[rows]

    def _find_tiles(self, rows: int) -> Tiles:
        offsets, columns = self.table.shape
        count = -(-columns // rows)
        present = torch.zeros((offsets, count * rows), dtype=torch.bool, device=self.table.device)
        torch.lt(self.table, self.num_in, out=present[:, :columns])
        return Tiles(present.view(offsets, count, rows).any(2))


_plans: WeakKeyDictionary[NeighborTable | KernelMap, dict[bool, RowPlan]] = WeakKeyDictionary()
"""The table of a map, or a map without one -> its plans, by the direction in which the table is read."""


def row_plan(kernel_map: KernelMap) -> RowPlan:
    """The plan of a map as if it were not flipped, made once: a symmetric map and its transpose share it."""
    owner = kernel_map if kernel_map.table is None else kernel_map.table
    plans = _plans.setdefault(owner, {})
    if kernel_map.scatters not in plans:
        plans[kernel_map.scatters] = _plan(kernel_map)
    return plans[kernel_map.scatters]


def _plan(kernel_map: KernelMap) -> RowPlan:
    rows = replace(kernel_map, flipped=False).neighbor_rows()
    order = offset_masks(rows, kernel_map.num_in, SORT_BITS).argsort(stable=True)
    return RowPlan(rows.index_select(1, order), order.to(torch.int32), kernel_map.num_in)


def _listed(marks: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) boolean -> (n, m) int32 with the marked columns of each row first, and (n,) int32 their number."""
    numbers = marks.to(torch.int8, memory_format=torch.contiguous_format)
    columns = numbers.argsort(dim=1, descending=True, stable=True)
    return columns.to(torch.int32), numbers.sum(1, dtype=torch.int32)

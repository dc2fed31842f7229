"""Lists of voxel keys as sets: sort, look up, unite."""

from __future__ import annotations

import torch
from torch import Tensor

TABLE_SPAN = 16
"""A dense table over the grid is used while it has at most this many entries for each voxel, or each look-up."""

MAX_TABLE = 2**21
"""Entries of the table that finds one list in another: eight megabytes."""

QUERIES = 2**13
"""Keys that are found in that table at a time; it holds the part of the grid between the first and the last of them."""


def is_strictly_increasing(keys: Tensor) -> bool:
    """Whether (N,) keys are sorted and unique."""
    return bool((keys[1:] > keys[:-1]).all())


class RowLookup:
    """Where the window that begins at a key starts: through a dense table while the grid is small, else by search.

    A window is ``window`` consecutive keys. Of a window that holds a key of the list, the start is that key's slot
    minus the key's place in the window; the slots must agree on it, which they do where they differ as the keys do, or
    by at least ``window``.

    Args:
        keys: (N,) int64, strictly increasing, in 0 ... cells - 1.
        cells: number of keys that the grid has.
        slots: (N,) int32, increasing; None: the rows 0 ... N - 1.
        absent: what is found for a window without a key; default N.
        window: see above; 1 looks up single keys.
        queries: how many keys will be looked up, about; default N. A dense table is worth more look-ups.
    """

    def __init__(
        self,
        keys: Tensor,
        cells: int,
        slots: Tensor | None = None,
        absent: int | None = None,
        window: int = 1,
        queries: int = 0,
    ) -> None:
        self.keys = keys
        self.slots = slots
        self.absent = keys.numel() if absent is None else absent
        self.window = window
        self.starts: Tensor | None = None
        if is_small_grid(cells, max(keys.numel(), queries)):
            self.starts = torch.full((cells + window - 1,), self.absent, dtype=torch.int32, device=keys.device)
            rows = torch.arange(keys.numel(), dtype=torch.int32, device=keys.device) if slots is None else slots
            for back in reversed(range(window)):  # shifted by window - 1, as the first key may be 0
                self.starts[keys + (window - 1 - back)] = rows - back

    def __call__(self, queries: Tensor, out: Tensor | None = None) -> Tensor:
        """Look windows up.

        Args:
            queries: integers of any shape, all in 0 ... cells - 1: the first keys of the windows.
            out: contiguous int32 of the same shape to write into; default a new tensor.

        Returns:
            int32 starts, ``absent`` where no key of the list is in the window.
        """
        out = torch.empty(queries.shape, dtype=torch.int32, device=queries.device) if out is None else out
        if self.starts is not None:
            torch.index_select(self.starts, 0, (queries + (self.window - 1)).flatten(), out=out.view(-1))
        elif self.keys.numel() == 0:
            out.fill_(self.absent)
        else:
            out.copy_(self._search(queries))
        return out

    def _search(self, queries: Tensor) -> Tensor:
        row = torch.searchsorted(self.keys, queries).clamp_(max=self.keys.numel() - 1)
        ahead = self.keys.index_select(0, row.flatten()).view(queries.shape) - queries
        slot = row if self.slots is None else self.slots.index_select(0, row.flatten()).view(queries.shape)
        return torch.where((ahead >= 0) & (ahead < self.window), slot - ahead, self.absent)


def is_small_grid(cells: int, count: int) -> bool:
    """Whether a dense table over the grid costs little beside ``count`` voxels: at most TABLE_SPAN entries for each."""
    return cells <= TABLE_SPAN * max(count, 2**14)


def find(keys: Tensor, queries: Tensor, cells: int) -> Tensor:
    """Rows of one list in another.

    On the CPU a few queries at a time go through a table of the part of the grid they lie in, which is written and
    cleared at the keys only: several times faster than a search. Parts that are too large for it are searched.

    Args:
        keys: (N,) int64, strictly increasing, in 0 ... cells - 1.
        queries: (M,) int64 likewise.
        cells: number of keys that the grid has.

    Returns:
        (M,) int32 rows, N for a query that is not among the keys.
    """
    count = keys.numel()
    found = torch.full(queries.shape, count, dtype=torch.int32, device=queries.device)
    if keys.is_cuda or count == 0:
        return RowLookup(keys, cells)(queries, found)
    size = min(cells, TABLE_SPAN * max(queries.numel(), 2**14), MAX_TABLE)
    table = torch.full((size,), count, dtype=torch.int32)
    for asked, out in zip(queries.split(QUERIES), found.split(QUERIES), strict=True):
        low, high = (int(asked[0]), int(asked[-1])) if len(asked) else (0, 0)
        start, stop = torch.searchsorted(keys, torch.tensor((low, high + 1))).tolist()
        rows = torch.arange(start, stop, dtype=torch.int32)
        if high - low >= size:
            RowLookup(keys[start:stop], cells, rows, count)(asked, out)
            continue
        places = keys[start:stop] - low
        table.index_copy_(0, places, rows)
        torch.index_select(table, 0, asked - low, out=out)
        table.index_fill_(0, places, count)
    return found


def contains(keys: Tensor, queries: Tensor, cells: int) -> Tensor:
    """Which queries are among the keys: (M,) boolean; arguments as in :func:`find`."""
    return find(keys, queries, cells) < keys.numel()


def sorted_unique(keys: Tensor, cells: int) -> Tensor:
    """Sorted unique values of keys in 0 ... cells - 1, through a bitmap of the grid while that is small."""
    if not is_small_grid(cells, keys.numel()):
        return torch.unique(keys)
    present = torch.zeros(cells, dtype=torch.bool, device=keys.device)
    present[keys] = True
    return present.nonzero()[:, 0]


def unite(first: Tensor, second: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unite two sorted key lists.

    Args:
        first: (N,) int64, strictly increasing.
        second: (M,) int64, strictly increasing.
        cells: number of keys that the grid has.

    Returns:
        The sorted union and the int32 rows of the first and of the second list in it.
    """
    in_first = find(first, second, cells)
    missing = (in_first == first.numel()).nonzero()[:, 0]
    extra = second[missing]
    before = torch.searchsorted(first, extra)  # keys of the first list before each one that is put between them
    shift = torch.zeros(first.numel() + 1, dtype=torch.int64, device=first.device)
    first_rows = shift.index_add_(0, before, torch.ones_like(before)).cumsum_(0)[:-1] + _numbers(first)
    extra_rows = before + _numbers(extra)
    union = first.new_empty(first.numel() + extra.numel())
    union[first_rows], union[extra_rows] = first, extra
    second_rows = torch.cat((first_rows, shift[-1:])).index_select(0, in_first)
    second_rows[missing] = extra_rows
    return union, first_rows.to(torch.int32), second_rows.to(torch.int32)


def _numbers(keys: Tensor) -> Tensor:
    return torch.arange(keys.numel(), device=keys.device)

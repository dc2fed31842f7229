"""Lists of voxel keys as sets: sort, look up, unite."""

from __future__ import annotations

import torch
from torch import Tensor

TABLE_SPAN = 16
"""A table over a part of the grid may have this many entries for each key that is looked up in it."""

MAX_TABLE = {"cpu": 2**22, "cuda": 2**25}
"""Entries of such a table at most, int32."""

MAX_ROWS = {"cpu": 2**14, "cuda": 2**18}
"""Rows that are looked up at a time."""

MIN_ROWS = 2**9
"""Fewer at a time would cost more calls than a search."""

SMALL_GRID = 2**14
"""Up to this many times TABLE_SPAN cells a grid is small whatever it holds."""


def is_strictly_increasing(keys: Tensor) -> bool:
    """Whether (N,) keys are sorted and unique."""
    return bool((keys[1:] > keys[:-1]).all())


def look_up(
    keys: Tensor,
    first: Tensor,
    steps: list[int],
    slots: Tensor | None = None,
    absent: int | None = None,
    window: int = 1,
    cells: int | None = None,
) -> Tensor:
    """Where the windows that begin at ``first + step`` start; a window is ``window`` consecutive keys of the grid.

    Of a window that holds a key of the list, the start is that key's slot minus the key's place in the window; the
    slots must agree on it, which they do where they differ as the keys do, or by at least ``window``.

    On a small grid all rows go through one table of it. Else a few rows at a time go through a table of the part of the
    grid that they reach, which is written and cleared at the keys only: several times faster than a search. Parts that
    are too large for it are searched.

    Args:
        keys: (N,) int64, strictly increasing.
        first: (M,) int64, strictly increasing.
        steps: S increasing numbers from 0 on.
        slots: (N,) int32, increasing; None: the rows 0 ... N - 1.
        absent: what is found for a window without a key; default N.
        window: see above; 1 looks up single keys.
        cells: Cells of the grid, if every key that is looked up lies in 0 ... cells - 1; None: nothing is known of it.

    Returns:
        (M, S) int32.
    """
    device = keys.device
    absent = keys.numel() if absent is None else absent
    if cells is not None and is_small(cells, max(keys.numel(), first.numel())):
        return _look_up_in_small_grid(keys, first, steps, slots, absent, window, cells)
    found = torch.full((first.numel(), len(steps)), absent, dtype=torch.int32, device=device)
    if found.numel() == 0 or keys.numel() == 0:
        return found
    reach = steps[-1] + window
    offsets = torch.tensor(steps, device=device)
    size, rows = _table_and_rows(int(first[-1] - first[0]) + reach, first.numel(), len(steps), device)
    table = _Table(size, absent, window, device)
    ends = torch.cat((first[rows - 1 : -1 : rows], first[-1:])) + reach
    bounds = torch.stack((first[::rows], ends))
    parts = zip(*bounds.tolist(), *torch.searchsorted(keys, bounds).tolist(), strict=True)
    for wanted, out, (low, end, start, stop) in zip(first.split(rows), found.split(rows), parts, strict=True):
        near = keys[start:stop] - low
        theirs = torch.arange(start, stop, dtype=torch.int32, device=device) if slots is None else slots[start:stop]
        queries = (wanted - low)[:, None] + offsets
        if stop > start and end - low > size:
            out.copy_(_search(near, theirs, queries, absent, window))
        elif stop > start:
            table.look_up(near, theirs, queries, out)
    return found


def is_small(cells: int, keys: int) -> bool:
    """Whether a table of all cells of a grid costs less than the calls that it saves for that many keys."""
    return cells <= TABLE_SPAN * max(keys, SMALL_GRID)


def _look_up_in_small_grid(
    keys: Tensor, first: Tensor, steps: list[int], slots: Tensor | None, absent: int, window: int, cells: int
) -> Tensor:
    starts = keys.new_full((cells + window - 1,), absent, dtype=torch.int32)
    slots = torch.arange(keys.numel(), dtype=torch.int32, device=keys.device) if slots is None else slots
    for ahead in range(window):
        behind = window - 1 - ahead
        starts.index_copy_(0, keys + ahead if ahead else keys, slots - behind if behind else slots)
    offsets = torch.tensor([step + window - 1 for step in steps], device=keys.device)
    return starts.index_select(0, (first[:, None] + offsets).view(-1)).view(-1, len(steps))


def _table_and_rows(span: int, rows: int, steps: int, device: torch.device) -> tuple[int, int]:
    """Entries of the table, and how many of ``rows`` that reach over ``span`` keys to look up at a time in it."""
    size = min(span, TABLE_SPAN * max(rows * steps, 2**13), MAX_TABLE.get(device.type, MAX_TABLE["cuda"]))
    most = MAX_ROWS.get(device.type, MAX_ROWS["cuda"])
    return size, most if size == span else min(most, max(size * rows // (2 * span), MIN_ROWS))


class _Table:
    """Starts of windows of a part of the grid, shifted by window - 1, as the first key may be 0."""

    def __init__(self, size: int, absent: int, window: int, device: torch.device) -> None:
        self.absent, self.window = absent, window
        self.starts = torch.full((size + window - 1,), absent, dtype=torch.int32, device=device)

    def look_up(self, keys: Tensor, slots: Tensor, queries: Tensor, out: Tensor) -> None:
        places = [keys + ahead for ahead in range(self.window)]
        for ahead, place in enumerate(places):
            self.starts.index_copy_(0, place, slots - (self.window - 1 - ahead))
        torch.index_select(self.starts, 0, (queries + (self.window - 1)).flatten(), out=out.view(-1))
        for place in places:
            self.starts.index_fill_(0, place, self.absent)


def _search(keys: Tensor, slots: Tensor, queries: Tensor, absent: int, window: int) -> Tensor:
    row = torch.searchsorted(keys, queries).clamp_(max=keys.numel() - 1)
    ahead = keys.index_select(0, row.flatten()).view(queries.shape) - queries
    slot = slots.index_select(0, row.flatten()).view(queries.shape)
    return torch.where((ahead >= 0) & (ahead < window), slot - ahead, absent)


def find(keys: Tensor, queries: Tensor, cells: int | None = None) -> Tensor:
    """Rows of one sorted list (M,) in another (N,): (M,) int32, N where a query is not among the keys.

    Args:
        keys: (N,) int64, strictly increasing.
        queries: (M,) int64, strictly increasing.
        cells: Cells of the grid, if both lists are numbers of its cells.
    """
    return look_up(keys, queries, [0], cells=cells)[:, 0]


def contains(keys: Tensor, queries: Tensor, cells: int | None = None) -> Tensor:
    """Which of (M,) sorted queries are among (N,) sorted keys: (M,) boolean; ``cells`` as in :func:`find`."""
    if cells is not None and is_small(cells, max(keys.numel(), queries.numel())):
        return _marked(cells, keys).index_select(0, queries)
    return find(keys, queries) < keys.numel()


def sorted_unique(keys: Tensor, cells: int) -> Tensor:
    """Sorted unique values of keys in 0 ... cells - 1, through a bitmap of the grid while that is small."""
    return _marked(cells, keys).nonzero().view(-1) if is_small(cells, keys.numel()) else torch.unique(keys)


def unite(first: Tensor, second: Tensor, cells: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Unite two sorted key lists.

    Args:
        first: (N,) int64, strictly increasing.
        second: (M,) int64, strictly increasing.
        cells: Cells of the grid, as in :func:`find`.

    Returns:
        The sorted union and the int32 rows of the first and of the second list in it.
    """
    if cells is not None and is_small(cells, max(first.numel(), second.numel())):
        return _unite_in_small_grid(first, second, cells)
    in_first = find(first, second)
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


def _unite_in_small_grid(first: Tensor, second: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    union = _marked(cells, first).index_fill_(0, second, True).nonzero().view(-1)
    rows = first.new_empty(cells, dtype=torch.int32)  # read at the union's cells only
    rows.index_copy_(0, union, torch.arange(union.numel(), dtype=torch.int32, device=union.device))
    return union, rows.index_select(0, first), rows.index_select(0, second)


def _marked(cells: int, keys: Tensor) -> Tensor:
    """(cells,) boolean, True at the keys."""
    return keys.new_zeros(cells, dtype=torch.bool).index_fill_(0, keys, True)


def _numbers(keys: Tensor) -> Tensor:
    return torch.arange(keys.numel(), device=keys.device)

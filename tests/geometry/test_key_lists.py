"""Lists of keys: order, look-up, search in one another and union against plain Python, up to the largest grids."""

from __future__ import annotations

import pytest
import torch

from monai_memeff.geometry import key_lists

LARGEST = 511 * 2**54


def test_strictly_increasing() -> None:
    for values, expected in (([], True), ([3], True), ([1, 2, 9], True), ([1, 1], False), ([2, 1], False)):
        assert key_lists.is_strictly_increasing(torch.tensor(values, dtype=torch.int64)) == expected


def limits(monkeypatch: pytest.MonkeyPatch, span: int, most: int, rows: int) -> None:
    monkeypatch.setattr(key_lists, "TABLE_SPAN", span)
    monkeypatch.setattr(key_lists, "MAX_TABLE", {"cpu": most, "cuda": most})
    monkeypatch.setattr(key_lists, "MIN_ROWS", rows)
    monkeypatch.setattr(key_lists, "MAX_ROWS", {"cpu": rows, "cuda": rows})


ROUTES = pytest.mark.parametrize(("span", "most"), [(0, 2**21), (16, 2**21), (16, 50)], ids=["search", "table", "both"])
GRIDS = pytest.mark.parametrize("cells", [None, 1301], ids=["parts", "whole grid"])
ROWS = pytest.mark.parametrize("rows", [1, 3, 2**14])


@ROUTES
@ROWS
@GRIDS
@pytest.mark.parametrize("steps", [[0], [0, 1, 2, 7], [0, 300, 301]])
def test_look_up_single_keys(
    span: int, most: int, rows: int, cells: int | None, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(monkeypatch, span, most, rows)
    keys, first = (torch.cat((torch.randint(900, (n,)), torch.tensor([999]))).unique() for n in (80, 200))
    for mine, theirs in ((keys, first), (keys[:0], first), (keys, first[:0]), (keys[30:], first[:60])):
        row = {key: number for number, key in enumerate(mine.tolist())}
        found = key_lists.look_up(mine, theirs, steps, cells=cells)
        assert found.dtype == torch.int32
        assert found.shape == (len(theirs), len(steps))
        assert found.tolist() == [[row.get(key + step, len(mine)) for step in steps] for key in theirs.tolist()]
        if steps == [0]:
            assert torch.equal(key_lists.find(mine, theirs, cells), found[:, 0])
            assert torch.equal(key_lists.contains(mine, theirs, cells), found[:, 0] < len(mine))


@ROUTES
@ROWS
@GRIDS
def test_windows(span: int, most: int, rows: int, cells: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch, span, most, rows)
    keys = torch.tensor([2, 3, 6, 40, 42, 700])
    slots = torch.tensor([2, 3, 6, 9, 11, 14], dtype=torch.int32)  # keys further apart than 3 stand 3 apart
    slot = dict(zip(keys.tolist(), slots.tolist(), strict=True))
    found = key_lists.look_up(keys, torch.arange(695), [0, 5], slots, absent=17, window=3, cells=cells)
    for start, pair in enumerate(found.tolist()):
        for begin, window in zip((start, start + 5), pair, strict=True):
            expected = {slot[key] - (key - begin) for key in range(begin, begin + 3) if key in slot} or {17}
            assert expected == {window}


def test_look_up_in_the_largest_grid() -> None:
    keys = torch.tensor([0, 5, 6, LARGEST - 1])
    assert key_lists.find(keys, torch.tensor([5, 7, LARGEST - 1])).tolist() == [1, 4, 3]
    assert key_lists.look_up(keys, torch.tensor([0, LARGEST - 6]), [0, 5]).tolist() == [[0, 1], [4, 3]]


@pytest.mark.parametrize("span", [0, 16], ids=["sort", "bitmap"])
def test_unique(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lists, "TABLE_SPAN", span)
    mixed = torch.tensor([98, 1, 7, 4, 50, 1, 0, 4])
    assert key_lists.sorted_unique(mixed, 99).tolist() == [0, 1, 4, 7, 50, 98]
    assert key_lists.sorted_unique(mixed[:0], 99).tolist() == []


@pytest.mark.parametrize("cells", [None, 99], ids=["search", "whole grid"])
def test_union(cells: int | None) -> None:
    lists = [torch.tensor([1, 4, 7, 50]), torch.tensor([0, 4, 50, 98]), torch.tensor([2, 3, 5, 6]), torch.arange(99)]
    lists = [*lists, lists[0][:0], torch.randint(99, (40,)).unique()]
    for one in lists:
        for other in lists:
            union, rows_one, rows_other = key_lists.unite(one, other, cells)
            assert torch.equal(union, torch.cat((one, other)).unique())
            assert torch.equal(union[rows_one.long()], one)
            assert torch.equal(union[rows_other.long()], other)
            assert rows_one.dtype == rows_other.dtype == torch.int32

"""Lists of keys: order, look-up, search in one another and union against plain Python, up to the largest grids."""

from __future__ import annotations

import pytest
import torch

from monai_memeff.geometry import key_lists

LARGEST = 511 * 2**54


def test_strictly_increasing() -> None:
    for values, expected in (([], True), ([3], True), ([1, 2, 9], True), ([1, 1], False), ([2, 1], False)):
        assert key_lists.is_strictly_increasing(torch.tensor(values, dtype=torch.int64)) == expected


@pytest.mark.parametrize("span", [0, 16], ids=["search", "table"])
@pytest.mark.parametrize("values", [[], [0], [3, 4, 9, 99], list(range(100))])
def test_look_up(values: list[int], span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lists, "TABLE_SPAN", span)
    keys, queries = torch.tensor(values, dtype=torch.int64), torch.arange(100).flip(0).view(20, 5)
    look_up = key_lists.RowLookup(keys, 100)
    expected = [[values.index(query) if query in values else len(values) for query in row] for row in queries.tolist()]
    rows = look_up(queries)
    assert rows.dtype == torch.int32
    assert rows.tolist() == expected
    assert look_up.absent == len(values)


def test_look_up_in_the_largest_grid() -> None:
    keys = torch.tensor([0, 5, LARGEST - 1])
    assert key_lists.RowLookup(keys, LARGEST)(keys.flip(0)).tolist() == [2, 1, 0]


@pytest.mark.parametrize(("span", "most"), [(0, 2**21), (16, 2**21), (16, 50)], ids=["search", "table", "both"])
@pytest.mark.parametrize("queries", [1, 3, 2**13])
def test_find_one_list_in_another(span: int, most: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lists, "TABLE_SPAN", span)
    monkeypatch.setattr(key_lists, "MAX_TABLE", most)
    monkeypatch.setattr(key_lists, "QUERIES", queries)
    keys, asked = (torch.cat((torch.randint(900, (n,)), torch.tensor([999]))).unique() for n in (80, 200))
    for mine, theirs in ((keys, asked), (keys[:0], asked), (keys, asked[:0]), (keys[30:], asked[:60])):
        row = {key: number for number, key in enumerate(mine.tolist())}
        found = key_lists.find(mine, theirs, 1000)
        assert found.dtype == torch.int32
        assert found.tolist() == [row.get(key, len(mine)) for key in theirs.tolist()]
        assert torch.equal(key_lists.contains(mine, theirs, 1000), found < len(mine))


def test_find_in_the_largest_grid() -> None:
    keys = torch.tensor([0, 5, 6, LARGEST - 1])
    assert key_lists.find(keys, torch.tensor([5, 7, LARGEST - 1]), LARGEST).tolist() == [1, 4, 3]


def test_a_table_is_taken_only_where_it_is_small() -> None:
    assert key_lists.is_small_grid(128**3, 2**17)
    assert not key_lists.is_small_grid(512**3, 2**17)
    assert not key_lists.is_small_grid(LARGEST, 2**20)


@pytest.mark.parametrize("span", [0, 16], ids=["sort", "bitmap"])
def test_unique(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lists, "TABLE_SPAN", span)
    mixed = torch.tensor([98, 1, 7, 4, 50, 1, 0, 4])
    assert key_lists.sorted_unique(mixed, 99).tolist() == [0, 1, 4, 7, 50, 98]
    assert key_lists.sorted_unique(mixed[:0], 99).tolist() == []


def test_union() -> None:
    lists = [torch.tensor([1, 4, 7, 50]), torch.tensor([0, 4, 50, 98]), torch.tensor([2, 3, 5, 6]), torch.arange(99)]
    lists = [*lists, lists[0][:0], torch.randint(99, (40,)).unique()]
    for one in lists:
        for other in lists:
            union, rows_one, rows_other = key_lists.unite(one, other, 99)
            assert torch.equal(union, torch.cat((one, other)).unique())
            assert torch.equal(union[rows_one.long()], one)
            assert torch.equal(union[rows_other.long()], other)
            assert rows_one.dtype == rows_other.dtype == torch.int32

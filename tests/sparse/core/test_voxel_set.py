"""Voxel sets: coarsening, batch bounds, subsets, and plans that live as long as somebody holds the set."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_memeff.geometry import key_lists
from monai_memeff.sparse import SparseTensor
from monai_memeff.sparse.core.voxel_set import VoxelSet
from tests.sparse.reference import random_mask, set_of

SHAPE = (7, 5, 9)


def some_voxels(batch: int = 3, empty_item: int | None = 1) -> VoxelSet:
    """A random set with an empty batch item."""
    mask = random_mask(batch, SHAPE, 0.2, empty_item)
    return SparseTensor.from_dense(torch.zeros(batch, 1, *SHAPE), mask).voxels


@pytest.mark.parametrize("stride", [(2, 2, 2), (3, 3, 3), (1, 2, 2), (8, 8, 16), (1, 1, 1)])
def test_coarsened_is_the_set_of_floors(stride: tuple[int, int, int]) -> None:
    fine = some_voxels()
    coarse = fine.coarsened(stride)
    expected = {(b, *(c // s for c, s in zip(place, stride, strict=True))) for b, *place in set_of(fine)}
    assert set_of(coarse) == expected
    assert len(coarse) == len(expected)
    assert coarse.spatial_shape == tuple(-(-extent // step) for extent, step in zip(SHAPE, stride, strict=True))
    assert (coarse.stride, coarse.batch_size, coarse.finer) == (stride, 3, fine)
    assert bool((coarse.keys.diff() > 0).all())


def test_strides_multiply_down_the_levels() -> None:
    coarse = some_voxels().coarsened((2, 2, 2)).coarsened((1, 2, 3))
    assert coarse.stride == (2, 4, 6)
    assert coarse.spatial_shape == (4, 2, 2)


def test_one_coarse_set_while_it_is_held_and_none_after() -> None:
    fine = some_voxels()
    coarse = fine.coarsened((2, 2, 2))
    assert fine.coarsened((2, 2, 2)) is coarse
    assert fine.coarsened((1, 2, 2)) is not coarse
    gc.disable()
    try:
        del coarse
        assert len(fine._coarser) == 0
    finally:
        gc.enable()


def test_batch_bounds_with_empty_items() -> None:
    fine = some_voxels()
    counts = torch.bincount(fine.coordinates[:, 0], minlength=3).tolist()
    assert counts[1] == 0
    assert fine.batch_bounds() == [0, counts[0], counts[0], len(fine)]
    assert fine.select(torch.zeros(len(fine), dtype=torch.bool)).batch_bounds() == [0, 0, 0, 0]


def test_plans_are_made_once_and_forgotten_on_demand() -> None:
    fine, made = some_voxels(), []

    def plan() -> str:
        made.append(1)
        return "plan"

    assert [fine.planned("name", plan), fine.planned("name", plan)] == ["plan", "plan"]
    assert len(made) == 1
    fine.forget_plans()
    fine.planned("name", plan)
    assert len(made) == 2


def test_subsets_stay_on_the_grid() -> None:
    coarse = some_voxels().coarsened((2, 2, 2))
    keep = torch.arange(len(coarse)) % 3 == 0
    for part in (coarse.select(keep), coarse.with_keys(coarse.keys[keep])):
        assert torch.equal(part.coordinates, coarse.coordinates[keep])
        assert part.same_grid(coarse)
        assert part.finer is coarse.finer
    assert not coarse.same_grid(coarse.finer)
    assert coarse.cells == 3 * 4 * 3 * 5


@pytest.mark.parametrize("send", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_tensor_can_be_copied_and_sent(send: Callable[[SparseTensor], SparseTensor]) -> None:
    coarse = some_voxels().coarsened((2, 2, 2))
    x = SparseTensor.on(coarse, torch.randn(len(coarse), 2))
    coarse.planned("name", lambda: "plan")
    y = send(x)
    assert torch.equal(y.dense(), x.dense())
    assert torch.equal(y.voxels.finer.keys, coarse.finer.keys)
    assert y.voxels.coarsened((2, 2, 2)).stride == (4, 4, 4)
    assert y.voxels._plans == {}


def test_an_empty_set_can_do_everything() -> None:
    empty = some_voxels(1, empty_item=0)
    assert len(empty) == len(empty.coarsened((2, 2, 2))) == 0
    assert empty.coordinates.shape == (0, 4)
    assert empty.batch_bounds() == [0, 0]


def test_threads_that_come_at_once_get_one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, plain, others = some_voxels(), key_lists.sorted_unique, list[object]()

    def meanwhile(make: Callable[[], object]) -> object:
        with ThreadPoolExecutor(1) as other:
            return other.submit(make).result()

    def sorted_unique(*args: Any) -> Tensor:
        monkeypatch.undo()
        others.append(meanwhile(lambda: fine.coarsened((2, 2, 2))))
        return plain(*args)

    monkeypatch.setattr(key_lists, "sorted_unique", sorted_unique)
    assert fine.coarsened((2, 2, 2)) is others[0]
    first = fine.planned("plan", lambda: [meanwhile(lambda: fine.planned("plan", lambda: ["of another"]))])
    assert first == fine.planned("plan", list) == ["of another"]

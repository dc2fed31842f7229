"""Neighbor tables on disk: the same tables come back, for the same voxels only, whatever happens to the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monai_memeff.sparse import SparseConv3d, SparseTensor
from monai_memeff.sparse.core import kernel_map, map_cache
from monai_memeff.sparse.core.kernel_map import plan_kernel_map
from monai_memeff.sparse.core.map_cache import keep_kernel_maps
from monai_memeff.sparse.core.neighbors import KernelShape
from tests.sparse.reference import fine_and_coarse, random_mask

SHAPE = (9, 8, 11)
CUBE = KernelShape((3, 3, 3), padding=(1, 1, 1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in use, for small sets too."""
    monkeypatch.setattr(map_cache, "MIN_VOXELS", 0)
    keep_kernel_maps(tmp_path / "maps")
    yield tmp_path / "maps"
    keep_kernel_maps(None)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every table of neighbors that is planned."""
    calls: list[int] = []
    plan = kernel_map.plan_neighbors
    monkeypatch.setattr(kernel_map, "plan_neighbors", lambda *arguments: calls.append(1) or plan(*arguments))
    return calls


def run(mask: Tensor) -> list[Tensor]:
    """Values and gradients of two layers on the mask's voxels, planned anew."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(SparseConv3d(2, 3), SparseConv3d(3, 4, 2, 2)).double()
    x = SparseTensor.from_dense(torch.randn(mask.shape[0], 2, *SHAPE).double(), mask)
    y = layers(x).features
    return [y, *torch.autograd.grad(y.square().sum(), list(layers.parameters()))]


def test_the_second_time_nothing_is_planned(folder: Path, plans: list[int]) -> None:
    mask = random_mask(2, SHAPE, 0.3)
    first = run(mask)
    assert len(list(folder.iterdir())) == 2
    planned = len(plans)
    for again, once in zip(run(mask), first, strict=True):
        assert torch.equal(again, once)
    assert len(plans) == planned > 0
    keep_kernel_maps(None)
    for plain, once in zip(run(mask), first, strict=True):
        assert torch.equal(plain, once)
    assert len(plans) > planned


def test_other_voxels_grids_and_kernels_have_files_of_their_own(folder: Path) -> None:
    fine, coarse = fine_and_coarse(random_mask(2, SHAPE, 0.3), 2)
    other = fine.with_keys(fine.keys[1:])
    wider = type(fine)(fine.keys, (9, 8, 22), 1)
    geometries = [
        (fine, fine, CUBE),
        (fine, other, CUBE),
        (other, fine, CUBE),
        (other, other, CUBE),
        (wider, wider, CUBE),
        (fine, fine, KernelShape((3, 3, 3), dilation=(2, 1, 1), padding=(2, 1, 1))),
        (fine, coarse, KernelShape((2, 2, 2), (2, 2, 2))),
    ]
    for number, geometry in enumerate(geometries, 1):
        expected = [rows.tolist() for pair in plan_kernel_map(*geometry).each_pair() for rows in pair]
        assert len(list(folder.iterdir())) == number
        found = [rows.tolist() for pair in plan_kernel_map(*geometry).each_pair() for rows in pair]
        assert found == expected


def test_damaged_files_are_planned_anew(folder: Path, plans: list[int]) -> None:
    mask = random_mask(1, SHAPE, 0.4)
    first = run(mask)
    for content in (b"", b"not a table"):
        for file in folder.iterdir():
            file.write_bytes(content)
        planned = len(plans)
        for again, once in zip(run(mask), first, strict=True):
            assert torch.equal(again, once)
        assert len(plans) > planned
    planned = len(plans)
    run(mask)
    assert len(plans) == planned  # mended


def test_a_full_folder_and_small_sets_stay_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_mask(1, SHAPE, 0.4)
    keep_kernel_maps(folder, max_bytes=100)
    run(mask)
    assert not list(folder.iterdir())
    keep_kernel_maps(folder)
    monkeypatch.setattr(map_cache, "MIN_VOXELS", 10**6)
    run(mask)
    assert not list(folder.iterdir())
    with pytest.raises(ValueError, match=r"must not be negative, got -1; use folder=None"):
        keep_kernel_maps(folder, max_bytes=-1)

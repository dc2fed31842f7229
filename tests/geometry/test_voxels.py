"""Voxel keys: order, inverse and coarsening against plain Python, up to the largest grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_memeff.geometry import voxels

ODD = (5, 3, 7)
HUGE = (2**18, 2**18, 2**18)


def every_voxel(shape: tuple[int, int, int], batch: int) -> Tensor:
    """All coordinates [batch, i, j, k] of a grid in lexicographic order."""
    return torch.cartesian_prod(*(torch.arange(extent) for extent in (batch, *shape)))


def test_keys_number_the_grid_in_lexicographic_order() -> None:
    coordinates = every_voxel(ODD, 2)
    keys = voxels.coordinates_to_keys(coordinates, ODD)
    assert torch.equal(keys, torch.arange(2 * 5 * 3 * 7))
    assert torch.equal(voxels.keys_to_coordinates(keys, ODD), coordinates)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_keys_do_not_overflow_in_the_dtype_of_the_coordinates(dtype: torch.dtype) -> None:
    shape = (2000, 3000, 4000)
    keys = voxels.coordinates_to_keys(torch.tensor([[3, 1999, 2999, 3999]], dtype=dtype), shape)
    assert keys.dtype == torch.int64
    assert keys.item() == 4 * 2000 * 3000 * 4000 - 1


def test_the_largest_grid_has_keys_up_to_the_largest_integer() -> None:
    voxels.check_extent(HUGE, 511)
    corners = torch.tensor([[0, 0, 0, 0], [510, 2**18 - 1, 0, 5], [510, 2**18 - 1, 2**18 - 1, 2**18 - 1]])
    keys = voxels.coordinates_to_keys(corners, HUGE)
    assert keys[-1].item() == 511 * 2**54 - 1 <= voxels.MAX_KEY
    assert torch.equal(voxels.keys_to_coordinates(keys, HUGE), corners)


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (4, 4, 2**18 + 1), (4, 4, 4, 4)])
def test_bad_extents_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"between 1 and 262144 .*got .*crop or resample"):
        voxels.check_extent(shape, 1)


def test_bad_batch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 2\^63 - 1, got batch_size 512.*smaller batch"):
        voxels.check_extent(HUGE, 512)
    with pytest.raises(ValueError, match=r"at least 1, got 0; give at least one volume"):
        voxels.check_extent((2, 2, 2), 0)


@pytest.mark.parametrize("scale", [(1, 1, 1), (2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 0, 4)])
def test_regrid_scales_and_shifts(scale: tuple[int, int, int], shift: tuple[int, int, int]) -> None:
    coordinates = every_voxel(ODD, 2)
    shape = tuple(n * f + d for n, f, d in zip(ODD, scale, shift, strict=True))
    keys = voxels.regrid(voxels.coordinates_to_keys(coordinates, ODD), ODD, shape, scale, shift)
    moved = coordinates * torch.tensor((1, *scale)) + torch.tensor((0, *shift))
    assert torch.equal(voxels.keys_to_coordinates(keys, shape), moved)


@pytest.mark.parametrize("scale", [(1, 1, 1), (2, 2, 2), (1, 3, 2), (4, 1, 5)])
@pytest.mark.parametrize("whole", [False, True], ids=["cells cut off", "whole cells"])
def test_regrid_shrinks_by_the_floor(scale: tuple[int, int, int], whole: bool) -> None:
    extents = tuple(n * f for n, f in zip((2, 3, 4), scale, strict=True)) if whole else ODD
    coordinates = every_voxel(extents, 2)
    before = voxels.coordinates_to_keys(coordinates, extents)
    keys, shape = before.clone(), tuple(-(-n // f) for n, f in zip(extents, scale, strict=True))
    coarse = voxels.keys_to_coordinates(voxels.regrid(keys, extents, shape, scale, shrink=True), shape)
    expected = [[b, *(c // f for c, f in zip(place, scale, strict=True))] for b, *place in coordinates.tolist()]
    assert coarse.tolist() == expected
    assert torch.equal(keys, before), "the keys that came in stay as they are"


def test_regrid_at_the_end_of_the_largest_grid() -> None:
    end = torch.tensor([511 * 2**54 - 1])
    half = (2**17, 2**17, 2**17)
    shrunk = voxels.regrid(end, HUGE, half, (2, 2, 2), shrink=True)
    assert shrunk.item() == 511 * 2**51 - 1
    assert voxels.regrid(shrunk, half, HUGE, (2, 2, 2), (1, 1, 1)).item() == end.item()

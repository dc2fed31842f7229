"""The one convention for positions, against torch's own sampling and against hand-made affines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_memeff.geometry import grid

SHAPE = (3, 4, 7)


def oblique_affine() -> torch.Tensor:
    """Spacing (0.5, 1.25, 3), turned about two axes, with a far origin."""
    a, b = 0.3, -0.7
    first = torch.tensor([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    second = torch.tensor([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = first @ second @ torch.diag(torch.tensor([0.5, 1.25, 3.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([-90.0, 1234.5, 7.0])
    return affine


def test_outer_faces_are_plus_and_minus_one() -> None:
    index = torch.tensor([[-0.5, -0.5, -0.5], [2.5, 3.5, 6.5], [1.0, 1.5, 3.0]])
    expected = torch.tensor([[-1.0, -1, -1], [1, 1, 1], [0, 0, 0]])
    assert torch.equal(grid.index_to_unit(index, SHAPE), expected)


def test_whole_indices_give_floating_points() -> None:
    assert grid.index_to_unit(torch.tensor([0, 0, 0]), (1, 2, 4)).tolist() == [0.0, -0.5, -0.75]


def centers() -> torch.Tensor:
    """All voxel centers in the unit cube, (H, W, D, 3)."""
    axes = torch.meshgrid(*(torch.arange(extent, dtype=torch.float64) for extent in SHAPE), indexing="ij")
    return grid.index_to_unit(torch.stack(axes, dim=-1), SHAPE)


def test_voxel_centers_are_torchs_grid_in_our_axis_order() -> None:
    theirs = F.affine_grid(torch.eye(3, 4, dtype=torch.float64)[None], (1, 1, *SHAPE), align_corners=False)[0]
    assert torch.allclose(centers().flip(-1), theirs, rtol=0, atol=1e-15)


def test_sampling_at_the_centers_returns_the_volume() -> None:
    image = torch.rand(2, 3, *SHAPE, dtype=torch.float64)
    places = centers().reshape(1, -1, 3).expand(2, -1, -1)
    for mode in ("bilinear", "nearest"):
        assert torch.allclose(grid.sample_at(image, places, mode).view_as(image), image, rtol=0, atol=1e-14)


def test_sampling_is_linear_between_two_voxels_of_one_axis() -> None:
    image = torch.zeros(1, 1, *SHAPE, dtype=torch.float64)
    image[0, 0, 1, 2, 3], image[0, 0, 1, 2, 4] = 10.0, 20.0
    point = grid.index_to_unit(torch.tensor([[[1.0, 2.0, 3.25]]], dtype=torch.float64), SHAPE)
    assert grid.sample_at(image, point).item() == pytest.approx(12.5)


def test_millimeters_through_the_affine() -> None:
    affine, index = oblique_affine(), torch.tensor([[0, 0, 0], [1, 0, 0], [2, 3, 6]])
    expected = (affine @ torch.cat((index, torch.ones(3, 1, dtype=torch.int64)), 1).double().T).T[:, :3]
    mm = grid.index_to_mm(index, affine)
    assert torch.allclose(mm, expected, rtol=0, atol=1e-12)
    assert torch.allclose(grid.mm_to_index(mm, affine), index.double(), rtol=0, atol=1e-11)


def test_spacing_and_volume() -> None:
    assert grid.spacing(oblique_affine()) == pytest.approx((0.5, 1.25, 3.0))
    assert grid.voxel_volume(oblique_affine().numpy()) == pytest.approx(0.5 * 1.25 * 3)


@pytest.mark.parametrize(
    ("affine", "anisotropic", "oblique"),
    [
        (np.eye(4), False, False),
        (np.diag([-1.0, -1, 1, 1]), False, False),
        (np.diag([1.0, 1.005, 1, 1]), False, False),
        (np.diag([1.0, 1.0, 1.3, 1]), True, False),
        (np.eye(4)[[1, 2, 0, 3]], False, False),
        (np.array([[1, 0.02, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), False, True),
        (oblique_affine().numpy(), True, True),
    ],
    ids=["identity", "flips", "half a percent", "thick slices", "swapped axes", "shear", "turned"],
)
def test_kinds_of_affine(affine: np.ndarray, anisotropic: bool, oblique: bool) -> None:
    assert grid.is_anisotropic(affine) is anisotropic
    assert grid.is_oblique(affine) is oblique


def test_a_crop_keeps_every_voxel_in_place() -> None:
    affine = oblique_affine()
    cropped = grid.crop_affine(affine, (1, -2, 5))
    here, there = torch.tensor([[0, 0, 0], [2, 3, 1]]), torch.tensor([[1, -2, 5], [3, 1, 6]])
    assert torch.allclose(grid.index_to_mm(here, cropped), grid.index_to_mm(there, affine), rtol=0, atol=1e-11)


def test_resampling_keeps_the_unit_cube_in_place() -> None:
    affine, new_shape = oblique_affine(), (6, 2, 21)
    resized = grid.resize_affine(affine, SHAPE, new_shape)
    mm = torch.rand(9, 3, dtype=torch.float64) * 200 - 100
    before = grid.index_to_unit(grid.mm_to_index(mm, affine), SHAPE)
    after = grid.index_to_unit(grid.mm_to_index(mm, resized), new_shape)
    assert torch.allclose(before, after, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.eye(3), "4x4, got shape"),
        (np.full((4, 4), np.nan), "finite"),
        (np.diag([1.0, 1, 0, 1]), "span space"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "span space"),
    ],
    ids=["2D", "NaN", "a flat axis", "parallel axes"],
)
def test_impossible_affines_are_refused(affine: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid.spacing(affine)


def test_points_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="one component per axis"):
        grid.index_to_unit(torch.zeros(5, 2), SHAPE)

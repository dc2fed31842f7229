"""The registered mirror finds a defect on one side by itself, and registration undoes a known motion."""

from __future__ import annotations

import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from monai_memeff.apps.skull.demo import mirror
from monai_memeff.apps.skull.demo.mirror import mirror_implant
from tests.apps.skull.demo.conftest import Case


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def _turn(yaw: float, shift: tuple[float, float, float]) -> np.ndarray:
    out = np.eye(4)
    out[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    out[:3, 3] = shift
    return out


@pytest.mark.slow
def test_a_defect_of_one_side_is_filled_from_the_other(case: Case) -> None:
    result = mirror_implant(case.defective, case.head.affine)
    assert not (result.implant & case.defective).any()
    assert _dice(result.implant, case.truth) > 0.8
    assert np.linalg.det(result.transform[:3, :3]) == pytest.approx(-1.0)
    assert 0 < result.residual_mm < case.head.cell_mm
    again = mirror_implant(case.defective, case.head.affine)
    np.testing.assert_array_equal(again.implant, result.implant)


@pytest.mark.slow
def test_a_turned_and_shifted_head_is_registered(case: Case) -> None:
    affine = case.head.affine
    move = _turn(np.radians(7), (6.0, -4.0, 2.0))
    defective, truth = (mirror.transform_mask(m, affine, np.linalg.inv(move)) for m in (case.defective, case.truth))
    result = mirror_implant(defective, affine)
    assert _dice(result.implant, truth & ~defective) > 0.7


@pytest.mark.slow
def test_a_defect_across_the_middle_is_filled_in_part(case: Case) -> None:
    cells = np.stack(np.meshgrid(*(np.arange(64),) * 3, indexing="ij"), axis=-1)
    world = cells @ case.head.affine[:3, :3].T + case.head.affine[:3, 3]
    truth = case.head.skull & (np.linalg.norm(world - np.array([-16.0, -20.0, 78.0]), axis=-1) < 32)
    result = mirror_implant(case.head.skull & ~truth, case.head.affine)
    assert 0.3 < _dice(result.implant, truth) < 0.9


@pytest.mark.slow
def test_bone_around_the_defect_is_registered_by_itself(case: Case) -> None:
    """Where that side is flatter than the other, by up to 4 mm, the whole skull's registration leaves the patch off."""
    affine, center = case.head.affine, np.array([-55.0, -10.0, 45.0])
    world = apply_affine(affine, np.moveaxis(np.indices((64, 64, 64)), 0, -1))
    distance = np.linalg.norm(world - center, axis=-1)
    moved = world - np.exp(-((distance / 60) ** 2))[..., None] * np.array([4.0, 0.0, 0.0])
    index = np.moveaxis(apply_affine(np.linalg.inv(affine), moved), -1, 0)
    skull = ndimage.map_coordinates(case.head.skull.astype(np.float32), index, order=1) >= 0.5
    truth = skull & (distance < 25)
    assert _dice(mirror_implant(skull & ~truth, affine).implant, truth) > 0.65  # 0.46 without


@pytest.mark.slow
def test_a_symmetric_skull_lacks_nothing(case: Case) -> None:
    whole = case.head.skull | case.head.skull[::-1]
    result = mirror_implant(whole, case.head.affine)
    assert result.implant.sum() < 0.01 * whole.sum()
    assert _dice(result.mirrored, whole) > 0.9


def test_registration_undoes_a_known_motion() -> None:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(4000, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    radii = np.array([60.0, 90.0, 40.0])
    points = normals * radii
    normals = normals / radii / np.linalg.norm(normals / radii, axis=1, keepdims=True)
    move = _turn(np.radians(5), (3.0, -2.0, 4.0))
    moved = points @ move[:3, :3].T + move[:3, 3]
    moved[:400] += rng.normal(size=(400, 3)) * 60  # a tenth has no partner
    target = mirror._Surface(moved, normals @ move[:3, :3].T)
    found, residual = mirror._icp(mirror._Surface(points, normals), target, mirror._tree(moved), np.eye(4), steps=100)
    np.testing.assert_allclose(found, move, atol=0.02)
    assert residual < 0.05


def test_one_step_towards_planes_is_a_rotation() -> None:
    rng = np.random.default_rng(2)
    normals = rng.normal(size=(50, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = rng.normal(size=(50, 3)) * 40
    small = _turn(0.01, (0.2, -0.1, 0.3))
    step = mirror._point_to_plane_step(points, mirror._Surface(points @ small[:3, :3].T + small[:3, 3], normals), 0.2)
    np.testing.assert_allclose(step, small, atol=0.02)
    np.testing.assert_allclose(step[:3, :3] @ step[:3, :3].T, np.eye(3), atol=1e-12)
    still = mirror._point_to_plane_step(points, mirror._Surface(points, normals), 0.2)
    np.testing.assert_allclose(still, np.eye(4), atol=1e-12)


def test_reflection_keeps_its_plane() -> None:
    points = np.random.default_rng(1).normal(size=(20, 3)) * 50
    flip = mirror._reflection(points, 0.1, -0.2, 3.0)
    np.testing.assert_allclose(flip @ flip, np.eye(4), atol=1e-9)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    normal = np.array([np.cos(0.1) * np.cos(-0.2), np.sin(0.1) * np.cos(-0.2), np.sin(-0.2)])
    on_plane = middle + 3.0 * normal
    np.testing.assert_allclose(flip[:3, :3] @ on_plane + flip[:3, 3], on_plane, atol=1e-9)


def test_too_little_bone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 50"):
        mirror_implant(np.zeros((8, 8, 8), bool), np.eye(4))

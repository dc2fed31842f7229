"""The ray caster against shapes whose picture is known: outline, depth, color, direction and light."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_memeff.apps.skull.demo import raycast as module
from monai_memeff.apps.skull.demo.raycast import View, look_at, raycast

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def _ball(center: tuple[float, float, float], radius: float, edge: int = 40) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(float(edge)),) * 3, indexing="ij"), axis=-1)
    distance = radius - np.linalg.norm(index - np.array(center), axis=-1)
    return np.clip(distance, -1, 1).astype(np.float32)


def _front(affine: np.ndarray, edge: int = 40) -> View:
    """From the front of the patient: the right side is on the left of the picture."""
    middle = affine[:3, :3] @ np.full(3, (edge - 1) / 2) + affine[:3, 3]
    return View(np.array([0.0, -1, 0]), np.array([-1.0, 0, 0]), np.array([0.0, 0, 1]), middle, 40.0)


def test_a_ball_has_a_round_outline_of_its_size_in_its_place() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [10, -20, 30]
    picture = raycast([_ball((25, 20, 12), 8)], [RED], affine, _front(affine), pixels=120)
    hit = (picture < 0.99).any(axis=-1)
    assert hit.sum() == pytest.approx(np.pi * (16 * 1.5) ** 2, rel=0.05)  # 16 mm at 1.5 pixels a millimeter
    row, column = (np.flatnonzero(hit.any(axis=a)).mean() for a in (1, 0))
    assert column == pytest.approx(59.5 - 5.5 * 2 * 1.5, abs=1)  # to the patient's right: left in the picture
    assert row == pytest.approx(59.5 + 7.5 * 2 * 1.5, abs=1)  # low
    assert (picture[~hit] == 1).all()
    assert picture[hit][:, 1:].max() < 1e-6, "red alone"


def test_the_nearer_surface_hides_the_farther_one() -> None:
    affine = np.eye(4)
    affine[:3, :3] *= 2
    near, far = _ball((20, 30, 20), 5), _ball((20, 10, 20), 10)
    picture = raycast([far, near], [BLUE, RED], affine, _front(affine), pixels=80)
    assert picture[40, 40, 0] > 0.3
    assert picture[40, 40, 2] < 0.01
    assert picture[40, 26, 2] > 0.1
    assert picture[40, 26, 0] < 0.01


def test_depth_is_where_the_surface_is() -> None:
    affine = np.eye(4)
    volume = torch.from_numpy(_ball((20, 20, 20), 9))[None, None]
    view = _front(affine)
    origin, direction = module._rays(volume.shape[2:], affine, view, 64)
    start = module._first_block(volume, origin, direction, 64)
    depth, hit = module._march(volume, origin, direction, start)
    place = origin[hit] + depth[hit, None] * direction
    radius = (place - 20).norm(dim=1)
    np.testing.assert_allclose(radius[radius < 9.5], 9, atol=0.25)
    assert (place[:, 1] > 19).all(), "the side towards the camera"
    plain, plain_hit = module._march(volume, origin, direction, torch.zeros_like(start))
    assert (plain_hit == hit).float().mean() > 0.995
    both = hit & plain_hit
    assert (depth - plain)[both].abs().median() < 0.1
    assert (start[hit] <= depth[hit] + 1e-3).all(), "no surface is skipped"


def test_light_comes_from_above() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    picture = raycast([_ball((20, 20, 20), 12)], [RED], affine, _front(affine), pixels=80)[..., 0]
    assert picture[24, 40] > 1.3 * picture[58, 40]


def test_nothing_to_see_is_white() -> None:
    empty = np.full((8, 8, 8), -1.0, np.float32)
    assert (raycast([empty], [RED], np.eye(4), _front(np.eye(4), 8), pixels=16) == 1).all()


@pytest.mark.parametrize("point", [(80, 0, 20), (-80, 10, 20), (5, 80, 30), (0, -80, 10), (0, 0, 90), (-3, -2, -90)])
def test_a_view_is_a_right_handed_frame_that_sees_the_point(point: tuple[float, float, float]) -> None:
    view = look_at(np.array(point, float), np.zeros(3), 100.0)
    frame = np.stack([view.right, view.up, -view.forward])
    np.testing.assert_allclose(frame @ frame.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(frame) == pytest.approx(1.0)
    assert view.up[2] > 0.5
    if point[2] > -50:
        assert np.array(point) @ -view.forward > 0.4 * np.linalg.norm(point)

"""Real holes are found where they are, on either side and across the midline, and complete heads have none."""

from __future__ import annotations

import numpy as np
import pytest

from monai_memeff.apps.skull.demo.real.holes import find_hole
from monai_memeff.apps.skull.demo.volume import HeadVolume
from tests.apps.skull.demo.conftest import Case


def ball(head: HeadVolume, middle: tuple[float, float, float], radius: float) -> np.ndarray:
    cells = np.stack(np.meshgrid(*(np.arange(head.size),) * 3, indexing="ij"), axis=-1)
    return np.linalg.norm(cells @ head.affine[:3, :3].T + head.affine[:3, 3] - np.array(middle), axis=-1) < radius


@pytest.mark.slow
def test_a_complete_head_has_no_hole(head: HeadVolume) -> None:
    assert find_hole(head.skull, head.affine) is None
    assert find_hole(head.skull & ~ball(head, (0, 0, 78), 6), head.affine) is None  # a burr hole of one square cm


@pytest.mark.parametrize("middle", [(-55, -10, 45), (60, 0, 40), (0, -80, 30), (3, 5, 75)])
@pytest.mark.slow
def test_a_hole_is_found_where_it_is(head: HeadVolume, middle: tuple[float, float, float]) -> None:
    removed = head.skull & ball(head, middle, 28)
    hole = find_hole(head.skull & ~removed, head.affine)
    assert hole is not None
    assert 12 < hole.area_cm2 < 40
    assert hole.others_cm2 == ()
    assert (hole.zone & removed).sum() > 0.9 * removed.sum()
    assert (hole.core & removed).sum() > 0.7 * removed.sum()
    truth = np.argwhere(removed).mean(axis=0) @ head.affine[:3, :3].T + head.affine[:3, 3]
    assert np.linalg.norm(hole.surface.mean(axis=0) - truth) < 8


@pytest.mark.slow
def test_a_slit_is_found_where_less_is_wanted(head: HeadVolume) -> None:
    """A saw's cut two cells wide: no hole of 4 cm2, and where it is once less is wanted; complete heads have none."""
    cells = np.stack(np.meshgrid(*(np.arange(head.size),) * 3, indexing="ij"), axis=-1)
    world = cells @ head.affine[:3, :3].T + head.affine[:3, 3]
    slit = (np.abs(world[..., 1] - 10) < head.cell_mm) & (world[..., 0] > 25) & (world[..., 2] > 40)
    cut = head.skull & ~slit
    assert find_hole(head.skull, head.affine, 0.2) is None
    assert find_hole(cut, head.affine) is None
    found = find_hole(cut, head.affine, 0.2)
    assert found is not None
    assert 0.2 < found.area_cm2 < 12
    assert found.surface[:, 0].min() > 20
    assert np.abs(found.surface[:, 1] - 10).max() < 3 * head.cell_mm


def test_the_largest_hole_is_filled_and_no_other_is_taught(head: HeadVolume) -> None:
    small = head.skull & ball(head, (60, 0, 40), 18)
    large = head.skull & ball(head, (-55, -10, 45), 30)
    hole = find_hole(head.skull & ~small & ~large, head.affine)
    assert hole is not None
    assert len(hole.others_cm2) == 1
    assert hole.surface[:, 0].max() < 0
    assert (hole.zone & small).sum() > 0.9 * small.sum()
    assert not (hole.core & small).any()


@pytest.mark.slow
def test_the_zone_turns_with_the_head(case: Case) -> None:
    hole = find_hole(case.defective, case.head.affine)
    turned = find_hole(case.defective[::-1], case.head.affine)
    assert hole is not None
    assert turned is not None
    overlap = (hole.zone & turned.zone[::-1]).sum()
    assert 2 * overlap > 0.9 * (hole.zone.sum() + turned.zone.sum())

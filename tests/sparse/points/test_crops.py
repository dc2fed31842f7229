"""Crops and samples of points, against plain loops and by what they leave."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from monai_memeff.sparse.points import CubeCrop, Data, FixedPoints, RandomSphere, RandomSphereDropout, SphereSampling
from monai_memeff.sparse.points.crops import _rotation
from tests.sparse.points.clouds import cloud


@pytest.mark.parametrize("align", [True, False])
def test_a_ball(align: bool) -> None:
    data, center = cloud(), (1.0, -2.0, 0.5)
    rows = [row for row, p in enumerate(data.pos.tolist()) if math.dist(p, center) <= 5.0]
    result = SphereSampling(5.0, center, align_origin=align)(data)
    assert 0 < len(rows) < 60
    shift = torch.tensor(center).double() if align else 0.0
    torch.testing.assert_close(result.pos, data.pos[rows] - shift)
    assert torch.equal(result.heat, data.heat[rows])
    assert len(SphereSampling(0.1, (99.0, 0, 0))(data).pos) == 0


def test_a_ball_keeps_its_surface() -> None:
    data = Data(torch.tensor([[3.0, 0, 0], [3.0001, 0, 0]]))
    assert SphereSampling(3.0, torch.zeros(3))(data).pos.tolist() == [[3.0, 0, 0]]


def test_a_random_ball_lies_around_a_point() -> None:
    data = cloud()
    crop = RandomSphere(4.0, center=False).set_random_state(1)
    counts = set()
    for _ in range(10):
        result = crop(data)
        assert len(result.pos) >= 1
        reach = torch.cdist(result.pos, result.pos).max()
        assert float(reach) <= 8.0
        counts.add(len(result.pos))
    assert len(counts) > 1
    centered = RandomSphere(4.0).set_random_state(1)(data)
    assert bool((centered.pos == 0).all(dim=1).any()), "the center is a point, moved to the origin"


def test_rare_classes_are_chosen_more_often() -> None:
    data = Data(torch.arange(100.0)[:, None].expand(-1, 3).contiguous(), y=(torch.arange(100) >= 99).long())
    for strategy, share in (("random", 0.01), ("freq_class_based", 1 / (1 + 1 / math.sqrt(99)))):
        crop = RandomSphere(0.5, strategy, center=False).set_random_state(0)
        hits = sum(int(crop(data).y[0]) for _ in range(400))
        spread = 4 * math.sqrt(400 * share * (1 - share))
        assert abs(hits - 400 * share) <= spread, (strategy, hits)


def test_a_cube_along_the_axes() -> None:
    data = cloud()
    crop = CubeCrop(3.0, rot_x=0, rot_y=0, rot_z=0, grid_size_center=1.0).set_random_state(2)
    for _ in range(10):
        result = crop(data)
        inside = ((data.pos - crop._center).abs() <= 3.0).all(dim=1)
        assert torch.equal(result.pos, data.pos[inside])
        assert torch.equal(result.y, data.y[inside])
        assert bool((data.pos == crop._center).all(dim=1).any())


def test_a_turned_cube() -> None:
    lattice = torch.cartesian_prod(*[torch.arange(-20.0, 21.0, 2)] * 3).double()
    crop = CubeCrop(6.0, grid_size_center=50.0).set_random_state(0)
    crop.randomize(Data(lattice))
    crop._center = torch.zeros(3).double()
    turn = crop._turn
    torch.testing.assert_close(turn @ turn.T, torch.eye(3).double())
    crop.randomize = lambda data: None  # type: ignore[method-assign]
    result = crop(Data(lattice)).pos
    expected = [p.tolist() for p in lattice if bool(((turn @ p).abs() <= 6.0).all())]
    assert result.tolist() == expected
    assert result.tolist() != lattice[(lattice.abs() <= 6).all(1)].tolist()


def test_rotations_turn_about_their_axis_alone() -> None:
    for axis in range(3):
        angles = [0.0, 0.0, 0.0]
        angles[axis] = math.pi / 2
        turn = torch.from_numpy(_rotation(angles))
        fixed = torch.eye(3).double()[axis]
        torch.testing.assert_close(turn @ fixed, fixed)
        assert float(torch.linalg.det(turn)) == pytest.approx(1.0)
        assert float(turn.trace()) == pytest.approx(1.0)


def test_dropping_balls() -> None:
    data = cloud()
    drop = RandomSphereDropout(3, radius=2.0, grid_size_center=1.0).set_random_state(0)
    result = drop(data)
    near = torch.cdist(data.pos, drop._centers).amin(1) <= 2.0
    assert 3 <= int(near.sum()) < 60
    assert torch.equal(result.x, data.x[~near])
    assert torch.equal(RandomSphereDropout(0, 2.0, 1.0)(data).pos, data.pos)
    assert len(RandomSphereDropout(2, 2.0, 1.0)(Data(torch.zeros(0, 3))).pos) == 0


def test_centers_are_even_over_space_and_not_over_points() -> None:
    """A hundred points in one cell and one in each of nine others: the crowd is met in a tenth of the draws."""
    lonely = torch.arange(1.0, 10.0)[:, None] * torch.tensor([[10.0, 0, 0]])
    data = Data(torch.cat((torch.rand(100, 3), lonely)))
    drop = RandomSphereDropout(1, radius=3.0, grid_size_center=5.0).set_random_state(0)
    crowd = sum(len(drop(data).pos) < 100 for _ in range(200))
    assert 5 <= crowd <= 40


def test_a_fixed_number() -> None:
    data = cloud()
    data.origin_id = torch.arange(60)
    drawn = {
        (replace, twice): FixedPoints(100, replace, twice).set_random_state(0)(data).origin_id
        for replace in (True, False)
        for twice in (True, False)
    }
    assert [len(drawn[k]) for k in ((True, True), (True, False), (False, True), (False, False))] == [100, 100, 100, 60]
    assert sorted(drawn[False, False].tolist()) == list(range(60))
    assert torch.bincount(drawn[False, True], minlength=60).tolist().count(0) == 0
    assert int(torch.bincount(drawn[False, True]).max()) == 2
    few = FixedPoints(7, replace=False).set_random_state(0)(data)
    assert len(set(few.origin_id.tolist())) == 7
    assert torch.equal(few.x, data.x[few.origin_id])


@pytest.mark.parametrize(
    "transform",
    [
        lambda: RandomSphere(4.0),
        lambda: CubeCrop(4.0, grid_size_center=1.0),
        lambda: RandomSphereDropout(3, 4.0, 1.0),
        lambda: FixedPoints(11),
    ],
)
def test_the_seed_decides_and_global_state_does_not(transform: Any) -> None:
    torch.manual_seed(1)
    first = transform().set_random_state(7)(cloud())
    torch.manual_seed(2)
    assert torch.equal(first.pos, transform().set_random_state(7)(cloud()).pos)
    others = [transform().set_random_state(seed)(cloud()) for seed in range(5)]
    assert any(o.pos.shape != first.pos.shape or not torch.equal(o.pos, first.pos) for o in others)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SphereSampling(0, (0, 0, 0)), "radius must be a positive number"),
        (lambda: RandomSphere(1.0, strategy="odd"), "strategy must be one of random, freq_class_based"),
        (lambda: RandomSphere(1.0, class_weight_method="odd"), r"class_weight_method one of sqrt, got .*'odd'"),
        (lambda: CubeCrop(-1), "c must be a positive number"),
        (lambda: CubeCrop(1, grid_size_center=0), "grid_size_center must be a positive"),
        (lambda: RandomSphereDropout(-1), "num_sphere must not be negative"),
        (lambda: FixedPoints(0), "num must be at least 1"),
        (lambda: FixedPoints(3)(Data(torch.zeros(0, 3))), "FixedPoints needs at least one point, got none"),
        (lambda: RandomSphere(3)(Data(torch.zeros(0, 3))), "RandomSphere needs at least one point"),
        (lambda: RandomSphere(3, "freq_class_based")(Data(torch.zeros(2, 3))), "needs one label y per point"),
    ],
)
def test_bad_arguments_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()

"""The challenge's scores against brute force over every pair of voxels, and their values on empty implants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import distance_transform_edt

from monai_memeff.apps.skull import ImplantMetric
from monai_memeff.apps.skull.metrics import (
    compute_border_dice,
    compute_implant_dice,
    compute_pooled_hausdorff,
    implant_scores,
)

SPACING = (0.7, 1.3, 2.1)


def _case(seed: int, shape: tuple[int, int, int] = (9, 7, 11)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted implant, true implant and defective skull: three ragged blobs, asymmetric, touching the border."""
    rng = np.random.default_rng(seed)
    truth, pred = np.zeros(shape, bool), np.zeros(shape, bool)
    truth[2:6, 1:5, 3:9] = rng.random((4, 4, 6)) < 0.8
    pred[1:6, 2:7, 4:11] = rng.random((5, 5, 7)) < 0.8
    skull = (rng.random(shape) < 0.1) & ~truth
    return pred, truth, skull


def _batch(*masks: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(m)[None, None].float() for m in masks]


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def _border(mask: np.ndarray) -> np.ndarray:
    """Points of a mask with a face outside it, by looking at the six neighbors of each."""
    points = []
    for p in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                q = p.copy()
                q[axis] += step
                if not (0 <= q[axis] < mask.shape[axis]) or not mask[tuple(q)]:
                    points.append(tuple(p))
    return np.array(sorted(set(points)), dtype=float)


def _pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm((a[:, None] - b[None]) * np.array(SPACING), axis=-1)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_brute_force(seed: int) -> None:
    pred, truth, skull = _case(seed)
    p, t, s = _batch(pred, truth, skull)
    assert compute_implant_dice(p, t).item() == pytest.approx(_dice(pred, truth), abs=1e-6)

    everywhere = np.argwhere(np.ones(pred.shape, bool)).astype(float)
    near = (_pairwise(everywhere, np.argwhere(skull).astype(float)).min(axis=1) <= 1.5).reshape(pred.shape)
    assert 0 < near.sum() < near.size
    expected = _dice(pred & near, truth & near)
    assert compute_border_dice(p, t, s, SPACING, distance_mm=1.5).item() == pytest.approx(expected, abs=1e-6)

    d = _pairwise(_border(pred), _border(truth))
    pooled = np.hstack([d.min(axis=0), d.min(axis=1)])
    for percentile in (50.0, 95.0, 100.0):
        got = compute_pooled_hausdorff(p, t, SPACING, percentile).item()
        assert got == pytest.approx(np.percentile(pooled, percentile), rel=1e-5)


@pytest.mark.parametrize("spacing", [None, 1.3, SPACING, np.array(SPACING)], ids=str)
@pytest.mark.parametrize("distance", [0.9, 2.5, 30.0])
def test_the_border_is_measured_where_implants_are(spacing: Any, distance: float) -> None:
    """Only the surroundings of the implants are looked at, with the result of the distances in the whole volume."""
    generator = torch.Generator().manual_seed(4)
    pred, truth, skull = (torch.rand(2, 1, 23, 19, 27, generator=generator) < share for share in (0.4, 0.5, 0.002))
    pred[:, :, :9], truth[:, :, :11], pred[:, :, 16:], truth[..., 20:] = False, False, False, False
    pred[1, 0, 0, 0, 0] = True
    far = [distance_transform_edt(~mask.numpy(), sampling=spacing) > distance for mask in skull[:, 0]]
    near = ~torch.from_numpy(np.stack(far))[:, None]
    expected = compute_implant_dice(pred & near, truth & near)
    assert torch.equal(compute_border_dice(pred, truth, skull, spacing, distance), expected)


def test_pooled_percentile_is_not_the_larger_of_two() -> None:
    from monai.metrics import compute_hausdorff_distance

    pred, truth, _ = _case(0)
    p, t = _batch(pred, truth)
    larger = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=SPACING).item()
    assert compute_pooled_hausdorff(p, t, SPACING).item() < larger


def test_empty_implants_have_stated_scores() -> None:
    _, truth, skull = _case(1)
    none, t, s = _batch(np.zeros_like(truth), truth, skull)
    for a, b, dice, distance in ((none, none, 1.0, 0.0), (none, t, 0.0, math.inf), (t, none, 0.0, math.inf)):
        assert compute_implant_dice(a, b).item() == dice
        assert compute_border_dice(a, b, s).item() == dice
        assert compute_pooled_hausdorff(a, b).item() == distance
    assert compute_border_dice(t, t, torch.zeros_like(s)).item() == 1.0
    full = torch.ones_like(t)
    assert compute_pooled_hausdorff(full, full).item() == 0.0


def test_batches_channels_and_spacing_per_item() -> None:
    pred, truth, skull = zip(*(_case(seed) for seed in range(4)), strict=True)
    p, t, s = (torch.from_numpy(np.stack(x)).reshape(2, 2, 9, 7, 11) for x in (pred, truth, skull))
    per_item = [[1.0, 1.0, 1.0], list(SPACING)]
    got = compute_pooled_hausdorff(p, t, per_item)
    border = compute_border_dice(p, t, s, per_item, 2.0)
    for b in range(2):
        for c in range(2):
            one = (p[b, c][None, None], t[b, c][None, None])
            assert got[b, c] == compute_pooled_hausdorff(*one, per_item[b])[0, 0]
            assert border[b, c] == compute_border_dice(*one, s[b, c][None, None], per_item[b], 2.0)[0, 0]


def test_all_scores_of_one_implant() -> None:
    pred, truth, skull = _case(2)
    scores = implant_scores(*(torch.from_numpy(x) for x in (pred & ~skull, truth, skull)), SPACING)
    assert scores["skull_dice"] == pytest.approx(_dice(pred | skull, truth | skull), abs=1e-6)
    assert scores["copy_dice"] == pytest.approx(_dice(skull, truth | skull), abs=1e-6)
    assert set(scores) == {"implant_dice", "border_dice", "hd95_mm", "skull_dice", "copy_dice"}


@pytest.mark.parametrize("score", ["dice", "border_dice", "hd95"])
def test_metric_accumulates_batches_lists_and_meta_tensors(score: str) -> None:
    cases = [_case(seed) for seed in range(3)]
    affine = torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64))
    metric = ImplantMetric(score=score, distance_mm=2.0)
    expected = []
    for pred, truth, skull in cases:
        p, t, s = _batch(pred, truth, skull)
        y = MetaTensor(torch.cat([t, s], dim=1)[0], affine=affine)
        metric([p[0]], [y])
        expected.append(
            {
                "dice": lambda p=p, t=t, s=s: compute_implant_dice(p, t),
                "border_dice": lambda p=p, t=t, s=s: compute_border_dice(p, t, s, SPACING, 2.0),
                "hd95": lambda p=p, t=t, s=s: compute_pooled_hausdorff(p, t, SPACING),
            }[score]().item()
        )
    assert metric.aggregate().item() == pytest.approx(np.mean(expected), rel=1e-5)
    np.testing.assert_allclose(metric.aggregate("none").flatten(), expected, rtol=1e-5)
    metric.reset()
    p, t, s = (torch.cat(x) for x in zip(*(_batch(*case) for case in cases), strict=True))
    fixed = ImplantMetric(score=score, spacing=SPACING, distance_mm=2.0, get_not_nans=True)
    fixed(p, torch.cat([t, s], dim=1))
    value, count = fixed.aggregate()
    assert value.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert count.item() == 3


def test_metric_in_a_monai_handler() -> None:
    pytest.importorskip("ignite", reason="MONAI's handlers need pytorch-ignite")
    from ignite.engine import Engine
    from monai.handlers import IgniteMetricHandler

    pred, truth, skull = _case(0)
    p, t, s = _batch(pred, truth, skull)
    engine = Engine(lambda _engine, batch: batch)
    handler = IgniteMetricHandler(ImplantMetric(score="border_dice"), output_transform=lambda out: out)
    handler.attach(engine, name="border")
    state = engine.run([(p, torch.cat([t, s], dim=1))])
    assert state.metrics["border"] == pytest.approx(compute_border_dice(p, t, s).item())


def test_what_does_not_fit_is_refused() -> None:
    pred, truth, skull = _batch(*_case(0))
    with pytest.raises(ValueError, match="one shape"):
        compute_implant_dice(pred, truth[..., 1:])
    with pytest.raises(ValueError, match="defective skull"):
        compute_border_dice(pred, truth, skull[..., 1:])
    with pytest.raises(ValueError, match="score must be one of"):
        ImplantMetric(score="hd")
    with pytest.raises(ValueError, match="2 channels"):
        ImplantMetric(score="border_dice")(pred, truth)
    with pytest.raises(ValueError, match="nothing to aggregate"):
        ImplantMetric().aggregate()
    with pytest.raises(ValueError, match="pass y"):
        ImplantMetric()(pred)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_scores_take_masks_only(number: int, wrong: float) -> None:
    """Logits, and NaN, are not zero, so each of them would count as implant or skull."""
    masks = _batch(*_case(0))
    masks[number][0, 0, 0, 0, 0] = wrong
    with pytest.raises(ValueError, match="an implant score needs"):
        compute_border_dice(*masks)
    with pytest.raises(ValueError, match="an implant score needs"):
        implant_scores(*(mask[0, 0] for mask in masks))


def test_scores_of_volumes_of_different_shapes_are_refused() -> None:
    pred, truth, skull = (mask[0, 0] for mask in _batch(*_case(0)))
    for masks in ((pred[1:], truth, skull), (pred, truth, skull[1:])):
        with pytest.raises(ValueError, match="one shape"):
            implant_scores(*masks)

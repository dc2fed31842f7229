"""The comparison from end to end, with few steps on a small head: the page, the numbers, the same every time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from monai_memeff.apps.systems import run
from monai_memeff.apps.systems.compare import SystemResult, compare, hidden_dice, train
from monai_memeff.apps.systems.montage import best_slice, class_colors, montage, panels
from monai_memeff.apps.systems.page import make_json, make_page
from monai_memeff.apps.systems.scan import Scan
from monai_memeff.apps.systems.systems import DenseSystem
from monai_memeff.errors import InputError


@contextlib.contextmanager
def no_progress(title: str) -> Iterator[Callable[[float, int, float], None]]:
    yield lambda fraction, step, loss: None


@pytest.fixture(scope="module")
def results(scan: Scan) -> list[SystemResult]:
    return compare(scan, 1e6, 3, no_progress, iterations=2)


@pytest.mark.slow
def test_all_systems_are_measured_and_halo_gives_the_dense_labels(scan: Scan, results: list[SystemResult]) -> None:
    assert [r.name for r in results] == ["dense", "sparse", "occupancy", "clstm", "halo"]
    dense, halo = results[0], results[-1]
    assert halo.different == 0
    assert halo.dice == dense.dice
    assert halo.test_peak_bytes < 0.4 * dense.test_peak_bytes
    assert halo.store_bytes > 0
    for result in results[:-1]:
        assert result.train_peak_bytes is not None
        assert result.train_peak_bytes > result.test_peak_bytes > 0
        assert result.labels.shape == scan.target.shape
        assert result.iterations == 2
        assert len(result.dice) == len(scan.names)


@pytest.mark.slow
def test_the_seed_decides(scan: Scan, results: list[SystemResult]) -> None:
    again = compare(scan, 1e6, 3, no_progress, iterations=2)
    assert [(r.dice, r.train_peak_bytes) for r in again] == [(r.dice, r.train_peak_bytes) for r in results]
    assert all((a.labels == b.labels).all() for a, b in zip(again, results, strict=True))


def test_dice_counts_hidden_slices_only(scan: Scan) -> None:
    assert all(value in (None, 1.0) for value in hidden_dice(scan.target, scan))
    assert hidden_dice(scan.target.masked_fill(~scan.hidden, 0), scan) == hidden_dice(scan.target, scan)
    assert all(value in (None, 0.0) for value in hidden_dice(scan.target * 0, scan))


@pytest.mark.long
def test_time_that_is_up_ends_a_training_and_is_told(scan: Scan, results: list[SystemResult]) -> None:
    done, _ = train(DenseSystem(scan), scan, 50, 1e-9, lambda *_: None)
    assert done == 1
    assert "The same seed gives the same training" in make_page(scan, results, 3)
    short = [SystemResult(**(vars(r) | {"planned": 5})) for r in results]
    assert "The time was up" in make_page(scan, short, 3)


def test_the_page_holds_what_was_measured(scan: Scan, results: list[SystemResult]) -> None:
    assert scan.hidden.movedim(scan.axis, 0)[best_slice(scan)].all()
    text = make_page(scan, results, 3)
    for word in ("0 labels that differ", "data:image/png", "skull", "Which system suits", "says little", "Seed 3"):
        assert word in text
    content = json.loads(make_json(scan, results, 3), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert content["systems"][-1]["different"] == 0
    assert content["classes"] == list(scan.names)


def test_pictures_are_radiological_and_true_to_scale(scan: Scan, results: list[SystemResult]) -> None:
    assert montage(scan, results)[:4] == b"\x89PNG"
    shown = dict(panels(scan, results))
    assert list(shown) == ["the scan", "to be found", "dense", "sparse", "occupancy", "clstm", "halo"]
    extents = [n * mm for a, (n, mm) in enumerate(zip(scan.target.shape, scan.step_mm, strict=True)) if a != scan.axis]
    rows, columns = shown["dense"].shape[:2]
    assert columns / rows == pytest.approx(extents[0] / extents[1], rel=0.02)
    empty = torch.zeros_like(scan.target)
    empty[0, -1] = 1  # the patient's left front
    one = replace(scan, shown=scan.shown * 0, target=empty, axis=2, hidden=torch.ones_like(scan.hidden))
    picture = dict(panels(one, []))["to be found"]
    assert picture[2, 2].max() == 0
    np.testing.assert_allclose(picture[2, -2], class_colors(7)[1, :3] * 0.6, atol=0.01)


@pytest.mark.slow
def test_a_run_writes_three_files_or_none(
    tmp_path: Path, scan: Scan, results: list[SystemResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_scan", lambda *_: scan)
    monkeypatch.setattr(run, "compare", lambda *_: results)
    out = tmp_path / "out"
    run.run_systems(None, None, out, iterations=1)
    assert {p.name for p in out.iterdir()} == {"systems.html", "systems.json", "systems.png"}

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(run, "make_page", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_systems(None, None, out, iterations=1)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="positive and finite"):
            run.run_systems(None, None, tmp_path / "out", seconds)
    with pytest.raises(InputError, match="a generated head has its own labels"):
        run.run_systems(None, tmp_path / "label.nii", tmp_path / "out")
    for image, label in ((None, None), (tmp_path / "ct.nii", tmp_path / "label.nii")):
        with pytest.raises(InputError, match="labels say what is to be found: leave out --threshold"):
            run.run_systems(image, label, tmp_path / "out", threshold=300.0)
    assert list(tmp_path.iterdir()) == []

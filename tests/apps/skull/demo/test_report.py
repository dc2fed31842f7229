"""The report: right numbers in table, text and JSON; files in the CT's geometry; all of them or none."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from rich.console import Console

from monai_memeff.apps.skull.demo import render, report
from monai_memeff.apps.skull.demo.report import MethodResult, make_report
from monai_memeff.apps.skull.metrics import implant_scores
from tests.apps.skull.demo.conftest import Case


def _scores(dice: float, hd95: float) -> dict[str, float]:
    return {"implant_dice": dice, "border_dice": dice / 2, "hd95_mm": hd95, "skull_dice": 0.99, "copy_dice": 0.97}


@pytest.fixture
def methods() -> list[MethodResult]:
    learned = MethodResult("sparse", [_scores(0.8, 3.0), _scores(0.6, 5.0)], 95.0, 420, 434_695, 22_345_678, 9_000_000)
    return [MethodResult("mirror", [_scores(0.5, 7.0), _scores(0.0, math.inf)]), learned]


def test_means_leave_out_distances_to_nothing(methods: list[MethodResult]) -> None:
    mirror, learned = methods
    assert learned.mean("implant_dice") == pytest.approx(0.7)
    assert learned.mean("hd95_mm") == pytest.approx(4.0)
    assert learned.empty == 0
    assert mirror.mean("hd95_mm") == 7.0
    assert mirror.empty == 1
    assert math.isnan(MethodResult("none", [_scores(0.0, math.inf)]).mean("hd95_mm"))


def test_table_and_text_say_the_same(case: Case, methods: list[MethodResult]) -> None:
    result = make_report(case.head, methods, seed=7)
    text = report.report_text(result)
    for word in ("mirror", "sparse", "0.700", "0.350", "4.0", "22.3", "9.0", "420", "copying the input", "0.9700"):
        assert word in text
    assert "one and the same head" in text
    assert "no implant for 1 of 2 defects" in text
    assert f"occupancy {case.head.occupancy:.1%}" in text
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.report_table(result))
    shown = console.export_text()
    assert "0.700" in shown
    assert "…" not in shown
    assert "0 unseen" in report.report_text(make_report(case.head, []))


def test_json_is_strict_and_whole(case: Case, methods: list[MethodResult]) -> None:
    result = make_report(case.head, methods, seed=7, ct_implant_dice=np.float64(0.5))
    content = json.loads(report.report_json(result), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert content["methods"][0]["scores"][1]["hd95_mm"] is None
    assert content["methods"][1]["mean"]["implant_dice"] == pytest.approx(0.7)
    assert content["methods"][1]["parameters"] == 434_695
    assert content["extra"] == {"ct_implant_dice": 0.5}
    assert content["one_head"] == report.ONE_HEAD
    assert content["cells"] == int(case.head.skull.sum())
    assert content["seed"] == 7


@pytest.mark.slow
def test_a_case_is_written_in_the_geometry_of_the_ct(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = render.raycast
    monkeypatch.setattr(render, "raycast", lambda *arguments: draw(*arguments, pixels=60))
    numbers = report.write_case(tmp_path, case.head, case.defective, case.truth, case.truth, "caption")
    names = {"implant.nii.gz", "removed_bone.nii.gz", "defective_skull.nii.gz", "implant.stl", "figure.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    implant, removed, remaining = (
        nibabel.load(tmp_path / f"{n}.nii.gz") for n in ("implant", "removed_bone", "defective_skull")
    )
    for image in (implant, removed, remaining):
        assert image.shape == case.head.bone.shape
        np.testing.assert_allclose(image.affine, case.head.ct_affine, atol=1e-4)
    parts = [np.asarray(i.dataobj) > 0 for i in (implant, removed, remaining)]
    assert not (parts[0] & parts[2]).any()
    np.testing.assert_array_equal(parts[1] | parts[2], case.head.bone)
    assert numbers["ct_implant_dice"] > 0.85
    assert numbers["implant_volume_ml"] == pytest.approx(parts[0].sum() * 2.5**3 / 1000)
    raw = (tmp_path / "implant.stl").read_bytes()
    count = struct.unpack("<I", raw[80:84])[0]
    points = np.frombuffer(raw[84:], dtype=[("n", "<f4", 3), ("p", "<f4", (3, 3)), ("a", "<u2")])["p"].reshape(-1, 3)
    assert len(points) == 3 * count
    center = np.argwhere(parts[0]).mean(axis=0) @ case.head.ct_affine[:3, :3].T + case.head.ct_affine[:3, 3]
    np.testing.assert_allclose(points.mean(axis=0) * [-1, -1, 1], center, atol=3)


@pytest.mark.slow
def test_an_empty_prediction_has_no_surface(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = render.raycast
    monkeypatch.setattr(render, "raycast", lambda *arguments: draw(*arguments, pixels=60))
    empty = np.zeros_like(case.truth)
    numbers = report.write_case(tmp_path, case.head, case.defective, case.truth, empty, "caption")
    assert numbers == {"ct_implant_dice": 0.0, "implant_volume_ml": 0.0}
    assert not (tmp_path / "implant.stl").exists()
    assert not np.asarray(nibabel.load(tmp_path / "implant.nii.gz").dataobj).any()
    scores = implant_scores(*(torch.from_numpy(x) for x in (empty, case.truth, case.defective)), case.head.cell_mm)
    assert scores["implant_dice"] == 0.0
    assert scores["skull_dice"] == scores["copy_dice"]

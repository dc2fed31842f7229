"""A head with a hole from end to end: what is taught, what is warned of, what is refused, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from monai_memeff.apps.skull.demo import render
from monai_memeff.apps.skull.demo.implant import defective_bone
from monai_memeff.apps.skull.demo.mirror import MirrorResult
from monai_memeff.apps.skull.demo.options import SkullOptions
from monai_memeff.apps.skull.demo.pretrained import ModelGrid, ShippedModel
from monai_memeff.apps.skull.demo.real import run as real_defect
from monai_memeff.apps.skull.demo.real.healthy import UNKNOWN, HealthyBoneSampler, training_heads
from monai_memeff.apps.skull.demo.real.holes import SkullHole, find_hole
from monai_memeff.apps.skull.demo.volume import HeadVolume
from monai_memeff.errors import InputError
from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet
from tests.apps.skull.demo.conftest import Case
from tests.apps.skull.demo.test_holes import ball


@pytest.fixture(scope="module")
def holed(case: Case) -> HeadVolume:
    """The head of the case as a scanner would see it after the operation."""
    return replace(case.head, skull=case.defective, bone=defective_bone(case.head, case.defective))


@pytest.fixture(scope="module")
def hole(holed: HeadVolume) -> SkullHole:
    found = find_hole(holed.skull, holed.affine)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def plane(holed: HeadVolume) -> MirrorResult:
    """A mirror at x = 0 of the world, without registration."""
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    empty = np.zeros_like(holed.skull)
    return MirrorResult(empty, real_defect.transform_mask(holed.skull, holed.affine, flip), flip, 0.0)


@pytest.mark.slow
def test_the_hole_is_never_taught_as_complete(
    case: Case, holed: HeadVolume, hole: SkullHole, plane: MirrorResult
) -> None:
    zone = real_defect.transform_mask(hole.zone, holed.affine, plane.transform)
    heads = training_heads(holed, hole, plane.mirrored, zone, [case.head.skull])
    patient, mirrored, other = heads
    unknown = patient.target[0].numpy() == UNKNOWN
    assert not (unknown & holed.skull).any()
    assert (unknown & case.truth).sum() > 0.85 * case.truth.sum()
    assert (mirrored.target[0].numpy() == UNKNOWN).any()
    assert not (other.target == UNKNOWN).any()
    draw = HealthyBoneSampler(heads, hole, seed=0)
    for _ in range(12):
        defective, target = draw()
        assert defective.shape == target.shape == (2, 1, 64, 64, 64)
        assert ((defective > 0) <= (target == 1)).all()  # nothing but bone goes in, and something was cut
        assert (defective.flatten(1).sum(1) < (target == 1).flatten(1).sum(1)).all()


@pytest.mark.slow
def test_unknown_cells_do_not_change_the_loss(case: Case, hole: SkullHole) -> None:
    """Whatever stands in the zone, the loss is the same once it is marked as unknown; without the mark it is not."""
    torch.manual_seed(0)
    network = SparseCompletionNet(ignore_index=UNKNOWN).train()
    defective = torch.from_numpy(case.defective[None, None].astype(np.float32))
    targets = []
    for filled in (case.defective, case.defective | case.truth):
        target = torch.from_numpy(filled[None, None].astype(np.float32))
        targets.append((target, target.masked_fill(torch.from_numpy(hole.zone), UNKNOWN)))
    assert not torch.equal(targets[0][0], targets[1][0])
    rest = ~torch.from_numpy(hole.zone)
    assert torch.equal(targets[0][1][0, 0][rest], targets[1][1][0, 0][rest]) is bool(
        (~hole.zone & case.truth).sum() == 0
    )
    criterion = SparseCompletionLoss(ignore_index=UNKNOWN)
    levels = network(defective, targets[0][1])
    with torch.no_grad():
        plain = SparseCompletionLoss()
        assert float(criterion(levels, targets[0][1])) != pytest.approx(float(plain(levels, targets[1][0])))


def test_warnings_name_the_midline_the_field_of_view_and_further_holes(
    head: HeadVolume, holed: HeadVolume, hole: SkullHole, plane: MirrorResult
) -> None:
    assert real_defect.find_warnings(holed, hole, plane) == ()
    assert real_defect.side_of(hole, plane) == "left"
    middle = find_hole(head.skull & ~ball(head, (3, 5, 75), 30), head.affine)
    assert middle is not None
    assert real_defect.side_of(middle, plane) == "both sides"
    assert "crosses the midline" in real_defect.find_warnings(holed, middle, plane)[0]
    low = holed.bone.shape[2] - 20
    cut = replace(holed, bone=holed.bone[:, :, :low])
    assert real_defect.outside_share(cut, middle) > 0.5
    assert any("cut off by the field of view" in w for w in real_defect.find_warnings(cut, middle, plane))
    assert real_defect.cap_share(head) < 0.4
    low_vault = replace(holed, skull=holed.skull & (np.arange(64) < 50))
    assert any("no image shows" in w for w in real_defect.find_warnings(low_vault, hole, plane))
    more = replace(hole, others_cm2=(5.0,))
    assert "further holes, of 5 cm2" in real_defect.find_warnings(holed, more, plane)[0]


def test_heads_that_have_no_hole_or_no_vault_are_refused(head: HeadVolume, holed: HeadVolume, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no hole of 4 cm2"):
        real_defect.hole_of(head)
    with pytest.raises(InputError, match=r"--smallest-cm2 0.2 --size 128 looks for them"):
        real_defect.hole_of(head)
    with pytest.raises(InputError, match=r"no hole of 0.5 cm2 or more"):
        real_defect.hole_of(head, 0.5)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--smallest-cm2 must be positive and finite"):
            real_defect.run_defective(SkullOptions(tmp_path / "out", Path("head.nii.gz")), wrong)
    with pytest.raises(InputError, match="lies outside the image"):
        real_defect.hole_of(replace(holed, bone=holed.bone[:5]))
    with pytest.raises(InputError, match="give its CT with --image"):
        real_defect.run_defective(SkullOptions(tmp_path))


@pytest.fixture
def quick(holed: HeadVolume, plane: MirrorResult, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = render.raycast
    monkeypatch.setattr(render, "raycast", lambda *arguments: draw(*arguments, pixels=60))
    monkeypatch.setattr(real_defect, "head_of", lambda *_, **__: holed)
    monkeypatch.setattr(real_defect, "mirror_implant", lambda *_: plane)
    monkeypatch.setattr(real_defect, "GENERATED", 1)


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_everything_is_written(holed: HeadVolume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    weights = SparseCompletionNet().state_dict()
    weights["heads.5.bias"] = weights["heads.5.bias"] + 5  # fills every candidate
    on_grid = replace(holed, model=ModelGrid(64, 4.0))
    monkeypatch.setattr(real_defect, "head_of", lambda *_, **__: on_grid)
    monkeypatch.setattr(real_defect, "shipped_model", lambda: ShippedModel(weights, ModelGrid(64, 4.0)))
    out = tmp_path / "out"
    real_defect.run_defective(SkullOptions(out, Path("head.nii.gz"), defects=1), iterations=1)
    names = {path.name for path in out.iterdir()}
    assert {"report.txt", "report.json", "figure.png", "implant.nii.gz", "mirror_implant.nii.gz"} <= names
    assert "mirror_implant.stl" in names
    content = json.loads((out / "report.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    called = [entry["name"] for entry in content["methods"]]
    assert called == ["registered mirror", "shipped model, before any training", "sparse network"]
    assert content["methods"][1]["training"] is None
    assert content["methods"][2]["training"]["iterations"] == 1
    assert content["side"] == "left"
    text = (out / "report.txt").read_text()
    assert "Nobody knows" in text
    mirror, left = (
        np.asarray(nibabel.load(out / f"{n}.nii.gz").dataobj) > 0 for n in ("mirror_implant", "defective_skull")
    )
    assert not (mirror & left).any()
    np.testing.assert_array_equal(left, holed.bone)


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(real_defect.report, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        real_defect.run_defective(SkullOptions(tmp_path / "out", Path("head.nii.gz"), defects=1), iterations=1)
    assert list(tmp_path.iterdir()) == []

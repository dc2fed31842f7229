"""`memeff certify` on a MONAI bundle: its own preprocessing, window and postprocessing, as `memeff run` has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_memeff.errors import InputError
from monai_memeff.hosts.certify import certify, command
from monai_memeff.hosts.certify.sources.subject import Options
from monai_memeff.hosts.run import run_studies
from tests.bundles.conftest import ROOT
from tests.hosts.bundles import image, small_bundle

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stock bundle with a small network and a small window."""
    return small_bundle(tmp_path_factory.mktemp("bundles") / "stock", inferer__roi_size=[16, 16, 16])


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume on a tilted grid."""
    affine = np.diag([-6.0, 5.0, 7.0, 1.0])
    affine[:3, :3] = affine[:3, :3] @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    file = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(image(), affine), file)
    return file


def certified(output: Path) -> dict[str, Any]:
    return json.loads((output / "certificate.json").read_text())


@pytest.mark.slow
def test_the_sliding_windows_labels_are_those_of_memeff_run(stock: Path, ct: Path, tmp_path: Path) -> None:
    assert run_studies(stock, [ct], tmp_path / "run") == 0
    label = tmp_path / "run" / "ct" / "segmentation.nii.gz"
    assert certify(str(stock), [ct], tmp_path / "out", [label], repeats=2, partitions=3) == 0
    found = certified(tmp_path / "out")
    scores = found["dice"]["runs"]
    assert list(scores["window"].values()) == [1.0]
    assert scores["whole"] == scores["streamed"]
    assert next(iter(scores["whole"].values())) < 1.0
    assert found["differences"]["window"]["voxels"] > 0
    assert found["differences"]["window"]["of"] == np.prod(nibabel.load(ct).shape)
    assert found["runs"]["window"]["details"]["roi_size"] == [16, 16, 16]
    file, sha = next(iter(found["model"]["files"].items()))
    assert file.endswith("models/model.pt")
    assert len(sha) == 64


@pytest.mark.parametrize("damage", ["truncated", "absent", "code", "foreign"])
def test_corrupted_weights_end_in_one_line(damage: str, ct: Path, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "bundle", inferer__roi_size=[16, 16, 16])
    weights = bundle / "models" / "model.pt"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "absent":
        weights.unlink()
    elif damage == "code":
        weights.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    else:
        small_bundle(tmp_path / "other", network={"channels": [8, 16], "strides": [2], "num_res_units": 0})
        weights.write_bytes((tmp_path / "other" / "models" / "model.pt").read_bytes())
    with pytest.raises(InputError) as refused:
        certify(str(bundle), [ct], tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_several_images_for_one_are_refused(stock: Path, ct: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--image was given 2 times"):
        certify(str(stock), [ct, ct], tmp_path / "out")


@pytest.mark.slow
def test_a_bundle_without_a_window_gets_one(ct: Path, tmp_path: Path) -> None:
    simple = {"inferer": {"_target_": "monai.inferers.SimpleInferer"}}
    bundle = small_bundle(tmp_path / "bundle", **simple)
    options = Options(window=(8, 8, 8))
    status = certify(str(bundle), [ct], tmp_path / "out", repeats=1, partitions=2, options=options)
    assert status in (0, command.NOT_EXACT)
    assert certified(tmp_path / "out")["runs"]["window"]["details"]["roi_size"] == [8, 8, 8]


@pytest.mark.slow
def test_a_label_of_other_values_is_refused_or_told(stock: Path, ct: Path, tmp_path: Path) -> None:
    """No class of the model has them: a Dice of 0 would look like a bad model."""
    volume = nibabel.load(ct)
    for values, name in (((0, 7), "seven"), ((0, 1, 7), "both")):
        label = np.random.default_rng(0).choice(values, volume.shape).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(label, volume.affine), tmp_path / f"{name}.nii.gz")
    with pytest.raises(InputError, match="the label holds 7 beside 0, and the model's classes are 1: give a label"):
        certify(str(stock), [ct], tmp_path / "out", [tmp_path / "seven.nii.gz"], repeats=1)
    assert not (tmp_path / "out").exists()
    assert certify(str(stock), [ct], tmp_path / "out", [tmp_path / "both.nii.gz"], repeats=1) == 0
    assert (
        "The label also holds 7, which no class of the model has: no Dice counts them."
        in (certified(tmp_path / "out")["notes"])
    )


@pytest.mark.slow
def test_postprocessing_that_takes_labels_gets_labels(ct: Path, tmp_path: Path) -> None:
    """An inferer of this package may give labels, and the bundle's postprocessing is made for them."""
    source, small = ROOT / "bundles" / "organ_occupancy", {"channels": [4, 8]}
    bundle = small_bundle(tmp_path / "bundle", source, small, pixdim=[6.0, 6.0, 7.0])
    assert run_studies(bundle, [ct], tmp_path / "run") == 0
    label = tmp_path / "run" / "ct" / "segmentation.nii.gz"
    options = Options(window=(16, 16, 16))
    status = certify(str(bundle), [ct], tmp_path / "out", [label], repeats=1, options=options)
    assert status == command.NOT_EXACT
    found = certified(tmp_path / "out")
    assert "OccupancyNet) is not run in parts" in found["verdict"]["sentence"]
    assert min(score for score in found["dice"]["runs"]["whole"].values() if score is not None) > 0.95

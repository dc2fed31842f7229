"""`memeff run` with the skull bundle: the surface of the implant beside its SEG, and the settings of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_memeff.apps.skull.phantom import head_phantom
from monai_memeff.errors import InputError
from monai_memeff.hosts.run import run_studies
from tests.bundles.conftest import ROOT
from tests.faults.dicom_files import write_series
from tests.hosts.bundles import TILTED

pytestmark = pytest.mark.filterwarnings("ignore")


BUNDLE = ROOT / "bundles" / "skull_completion_sparse"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head without a piece of its vault."""
    folder = tmp_path_factory.mktemp("heads") / "head"
    values = head_phantom(shape=(46, 56, 60), spacing=4.0, seed=0).image.numpy().astype(np.int16)
    top = int(np.argwhere(values > 300)[:, 2].max())
    values[26:36, 20:32, top - 8 :] = np.minimum(values[26:36, 20:32, top - 8 :], 40)
    write_series(folder, values, (4.0, 4.0, 4.0), axes=TILTED)
    return folder


@pytest.mark.slow
def test_the_surface_of_the_implant_lies_on_its_voxels(head: Path, tmp_path: Path) -> None:
    assert run_studies(BUNDLE, [head], tmp_path, (), "nifti") == 0
    found: Any = nibabel.load(tmp_path / "head" / "implant.nii.gz")
    mask = np.asarray(found.dataobj) > 0
    assert mask.any()
    stl = (tmp_path / "head" / "implant.stl").read_bytes()
    assert b"SPACE=LPS" in stl[:80]
    triangles = np.frombuffer(stl[84:], dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")])
    corners = triangles["corners"].reshape(-1, 3) * [-1, -1, 1]  # RAS
    index = np.linalg.solve(found.affine, np.c_[corners, np.ones(len(corners))].T)[:3]
    places = np.argwhere(mask).T
    assert np.allclose(index.min(1), places.min(1) - 0.5, atol=1e-2)
    assert np.allclose(index.max(1), places.max(1) + 0.5, atol=1e-2)
    a, b, c = np.moveaxis(triangles["corners"].astype(float), 1, 0)
    volume = abs(np.einsum("ij,ij->", a, np.cross(b, c))) / 6
    assert volume == pytest.approx(mask.sum() * 64, rel=0.15)
    report = json.loads((tmp_path / "head" / "report.json").read_text())["results"]
    entry = next(result for result in report if result["file"] == "implant.stl")
    assert entry == {"file": "implant.stl", "surface of": "implant", "sha256": hashlib.sha256(stl).hexdigest()}
    assert not (tmp_path / "head" / "completed.stl").exists()


def test_weights_under_other_settings_are_refused(head: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"cell_mm": 2.0}))
    with pytest.raises(InputError, match=r"was trained with --cell_mm 4\.0, got --cell_mm 2\.0"):
        run_studies(BUNDLE, [head], tmp_path / "out", [str(other)], "nifti")

"""What dcm2niix makes of a series and dcmqi of its SEG: the labels of `memeff run` lie where they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_memeff.hosts.run import run_studies
from tests.hosts.bundles import image, series, small_bundle

pytest.importorskip("highdicom", reason="DICOM SEG needs the extra [dicom]")
pytestmark = pytest.mark.filterwarnings("ignore")


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed: pip install dcm2niix dcmqi")
    return found


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tilted series, and its labels as NIfTI and as SEG."""
    folder = tmp_path_factory.mktemp("readers")
    series(folder / "ct")
    bundle = small_bundle(folder / "bundle", inferer__roi_size=[16, 16, 16])
    for form in ("nifti", "seg"):
        assert run_studies(bundle, [folder / "ct"], folder / form, (), form) == 0
    results = folder / "nifti" / "ct" / "segmentation.nii.gz", folder / "seg" / "ct" / "segmentation.dcm"
    return folder / "ct", *results


def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    found: Any = nibabel.load(file)
    return np.asarray(found.dataobj), found.affine


def on_grid_of(values: np.ndarray, affine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The voxels in the order of another affine of the same grid, found by millimeters alone."""
    places = np.linalg.solve(
        other, affine @ np.concatenate([np.indices(values.shape).reshape(3, -1), np.ones((1, values.size))])
    )
    whole = np.rint(places[:3]).astype(int)
    assert np.abs(places[:3] - whole).max() < 1e-2
    moved = np.zeros_like(values)
    moved[tuple(whole)] = values.ravel()
    return moved


@pytest.mark.slow
def test_labels_lie_on_the_volume_that_dcm2niix_makes_of_the_series(
    studies: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    ct, nifti, _ = studies
    command = [program("dcm2niix"), "-o", str(tmp_path), "-f", "x", "-b", "n", "-z", "n", str(ct)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    theirs, their_affine = read(tmp_path / "x.nii")
    labels, affine = read(nifti)
    assert theirs.shape == labels.shape
    assert np.array_equal(on_grid_of(theirs, their_affine, affine), image(seed=1))


@pytest.mark.slow
def test_dcmqi_reads_the_labels_of_the_seg_where_the_nifti_has_them(
    studies: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, nifti, seg = studies
    command = [program("segimage2itkimage"), "-t", "nii", "--mergeSegments", "--inputDICOM", str(seg)]
    done = subprocess.run(
        [*command, "--outputDirectory", str(tmp_path)], check=True, capture_output=True, text=True, timeout=60
    )
    assert "absent" not in done.stdout + done.stderr  # an attribute that the standard asks for
    theirs, their_affine = read(tmp_path / "1.nii.gz")
    labels, affine = read(nifti)
    assert np.array_equal(on_grid_of(theirs, their_affine, affine), labels)
    assert len(np.unique(labels)) == 2
    described = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"][0][0]
    assert described["SegmentLabel"] == "organ"
    assert described["SegmentAlgorithmType"] == "AUTOMATIC"

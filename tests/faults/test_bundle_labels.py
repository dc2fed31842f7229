"""Labels that a bundle cannot learn from or score end in one line with the file's name, in training and validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import ConfigParser

from monai_memeff.bundles import bundle_path
from monai_memeff.errors import InputError
from tests.bundles.conftest import save_nifti

SMALL: dict[str, Any] = {"coarse_size": [4, 4, 4], "side": 8, "pixdim": [8.0, 8.0, 8.0], "organs": ["liver", "lesion"]}
PROGRAMS = [
    ("cranial_cavity_clstm", "train"), ("liver_tumor_halo", "train"), ("organ_occupancy", "train"),
    ("organ_superresolution_sparse", "train"), ("organ_superresolution_sparse", "train_dense"),
]  # fmt: skip
"""All with labels; the skulls of the fifth bundle are made of intensities."""

SHAPE = (10, 11, 12)
AFFINE = np.diag([8.0, 8.0, 8.0, 1.0])


def shifted(axis: int, millimeters: float) -> np.ndarray:
    moved = AFFINE.copy()
    moved[axis, 3] = millimeters
    return moved


def labels(value: float = 1.0, everywhere: bool = False) -> np.ndarray:
    label = np.zeros(SHAPE, np.float32)
    label[3:7, 3:7, 3:7] = 1
    label[:2] = value
    return np.full(SHAPE, value, np.float32) if everywhere else label


WRONG: dict[str, tuple[np.ndarray, np.ndarray, str]] = {
    "ignored": (labels(255), AFFINE, "255"),
    "ignored everywhere": (labels(255, True), AFFINE, "255"),
    "negative": (labels(-1), AFFINE, "-1"),
    "fractions": (labels(0.5), AFFINE, "fractions"),
    "NaN": (labels(np.nan), AFFINE, "not finite"),
    "other extents": (labels()[:-1], AFFINE, "must share a grid"),
    "half a voxel aside": (labels(), shifted(0, 4), "0.5 voxels beside"),
    "another patient": (labels(), shifted(2, 300), "37.5 voxels beside"),
    "mirrored": (labels(), np.diag([-8.0, 8.0, 8.0, 1.0]), "voxels beside"),
}


def prepared(bundle: str, program: str, part: str, label: np.ndarray, affine: np.ndarray, folder: Path) -> Any:
    """The sample that a bundle makes of one case."""
    files = {"image": folder / "imagesTr" / "case.nii.gz", "label": folder / "labelsTr" / "case.nii.gz"}
    save_nifti(files["image"], np.random.default_rng(0).normal(0, 99, SHAPE).astype(np.float32), AFFINE)
    save_nifti(files["label"], label, affine)
    parser = ConfigParser()
    parser.read_config(str(bundle_path(bundle) / "configs" / f"{program}.json"))
    parser.update({**{key: value for key, value in SMALL.items() if key in parser.config}, "dataset_dir": str(folder)})
    return parser.get_parsed_content(f"{part}#preprocessing")(files)


@pytest.mark.parametrize("part", ["train", "validate"])
@pytest.mark.parametrize(("bundle", "program"), PROGRAMS)
def test_labels_that_teach_or_score_wrongly_are_refused(bundle: str, program: str, part: str, tmp_path: Path) -> None:
    images = bundle != "organ_superresolution_sparse" or program == "train_dense"
    for number, (kind, (label, affine, words)) in enumerate(WRONG.items()):
        if not images and "grid" in words + "grid" * ("beside" in words):
            continue  # this program reads labels alone
        with pytest.raises(RuntimeError) as caught:
            prepared(bundle, program, part, label, affine, tmp_path / str(number))
        first: BaseException = caught.value
        while first.__cause__ is not None:
            first = first.__cause__
        assert isinstance(first, InputError), kind
        assert words in str(first), kind
        assert "labelsTr" in str(first), kind
    assert prepared(bundle, program, part, labels(), AFFINE, tmp_path / "right")


def test_a_value_of_255_is_a_label_where_it_is_said_to_be(tmp_path: Path) -> None:
    label = labels(255)
    parser = ConfigParser()
    parser.read_config(str(bundle_path("organ_superresolution_sparse") / "configs" / "train.json"))
    for options, count in (({"unannotated": None}, 64), ({"label": 255}, 264), ({"unannotated": 7}, 64)):
        parser.update({**options, "coarse_size": [4, 4, 4]})
        save_nifti(tmp_path / "case.nii.gz", label, AFFINE)
        sample = parser.get_parsed_content("validate#preprocessing")({"label": tmp_path / "case.nii.gz"})
        assert int(sample["label"].sum()) == count
        parser.update({"label": 1, "unannotated": 255})

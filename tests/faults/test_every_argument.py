"""Every numeric argument of every public name: what cannot be meant is refused by the argument's name, in one line."""

from __future__ import annotations

import math
import traceback
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from tests.faults.numeric_arguments import callables, needed, numeric_parameters

PROBES: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "text": "x",
    "none": None,
    "huge": 10**30,
    "complex": 2j,
    "empty": [],
}
ANY, POSITIVE, NOT_NEGATIVE = "-1 0 1.5 huge", "1.5 huge", "0 1.5 huge"
ACCEPTED: dict[str, str] = {
    **dict.fromkeys(("background", "constant", "label", "rot_x", "rot_y", "rot_z", "threshold"), ANY),
    **dict.fromkeys(("c", "contrast", "factor", "grid_size_center", "radius", "size", "slab", "spacing"), POSITIVE),
    **dict.fromkeys(("bend", "class_weights", "coarse_weight", "distance_mm", "eps", "face_mm", "gamma"), NOT_NEGATIVE),
    **dict.fromkeys(("lr", "overlap", "pade_lr", "rotation", "shear", "tolerance"), NOT_NEGATIVE),
    **dict.fromkeys(("blocks", "components", "context_channels", "cut", "dropout", "face", "false_negatives"), "0"),
    **dict.fromkeys(
        ("false_positives", "first_slices", "fraction", "iterations", "max_bytes", "min_ratio", "mirror_axis"), "0"
    ),
    **dict.fromkeys(("momentum", "num_res_units", "num_sphere", "opening", "p", "padding", "prefetch", "prob"), "0"),
    **dict.fromkeys(("dice_weight", "recompute", "scale", "seed", "spots", "top_margin"), "0"),
    **dict.fromkeys(("axis", "ignore_index"), "-1 0"),
    "percentile": "0 1.5",
    "pixdim": ANY,  # MONAI's Spacing keeps an axis whose number is not positive
    "sphere_center": ANY,
    "unannotated": "-1 0",
    "weights": POSITIVE,
    "CoarseToSparseUNet.dilation": "0",
    "DownsampleMask.pixdim": "",
    "DownsampleMaskd.pixdim": "",
    "DilateMask.size": "",
    "DilateMaskd.size": "",
    "OpenMask.size": "",
    "OpenMaskd.size": "",
    "RandSegmentationErrors.radius": NOT_NEGATIVE,
    "RandSegmentationErrorsd.radius": NOT_NEGATIVE,
    "RandSkullDefect.size": "",
    "RandSkullDefectd.size": "",
    "SlabInferer.slab": "",
    "SpatialPartitionInferer.axis": "0",
    "NiftiSlabs.slab": "",
    "SparseCompletionLoss.ignore_index": "-1",
    "SparseCompletionNet.ignore_index": "-1",
    "AddFeatsByKeys.input_nc_feats": "none",
    "labels_to_mesh.label": "",  # no voxel has it
    "logits_to_mesh.label": "0",
    "plan.axis": "0",
    "verify.axis": "0",
}
"""Argument -> probes that can be meant, beside None where the annotation has it."""
CASES = [(name, thing, p) for name, thing in callables() for p in numeric_parameters(thing)]


def outcome(thing: Any, arguments: dict[str, Any], name: str) -> str:
    """Empty when it works, "refused", or what is wrong with the refusal."""
    try:
        thing(**arguments)
    except Exception as error:
        words = str(error)
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = isinstance(error, (ValueError, TypeError)) and "monai_memeff" in where
        fine = ours and "\n" not in words and name.split("_")[0].rstrip("s") in words
        return "refused" if fine else f"{type(error).__name__}: {words} ({where})"
    return ""


def inside(value: Any, parameter: Any, usual: Any) -> Any:
    """The value as one of a sequence, where the annotation has sequences."""
    if not any(word in str(parameter.annotation) for word in ("Sequence", "tuple", "Size")):
        return None
    return (value, *(usual[1:] if isinstance(usual, (tuple, list)) and usual else (2, 2)))


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for those that read or write one."""
    file = tmp_path_factory.mktemp("arguments") / "volume.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.eye(4)), file)
    return file


@pytest.mark.parametrize(("name", "thing", "parameter"), CASES, ids=[f"{n}-{p.name}" for n, _, p in CASES])
@pytest.mark.slow
def test_a_number_that_cannot_be_meant_is_refused_by_name(name: str, thing: Any, parameter: Any, volume: Path) -> None:
    arguments = needed(name)
    if name in ("LabelFile", "NiftiSlabs"):
        arguments["path"] = volume
    annotation = str(parameter.annotation)
    wanted = ACCEPTED.get(f"{name}.{parameter.name}", ACCEPTED.get(parameter.name, "")).split()
    wanted += ["none"] if "None" in annotation.split(" | ") and parameter.name not in needed(name) else []
    for probe, value in PROBES.items():
        usual = arguments.get(parameter.name, parameter.default)
        answers = [outcome(thing, {**arguments, parameter.name: value}, parameter.name)]
        if (sequence := inside(value, parameter, usual)) is not None:
            answers.append(outcome(thing, {**arguments, parameter.name: sequence}, parameter.name))
        assert all(answer in ("", "refused") for answer in answers), (probe, answers)
        assert ("" in answers) == (probe in wanted), (probe, answers)


def test_every_public_name_with_numbers_is_walked() -> None:
    assert len(CASES) > 150
    for name, thing in callables():
        if numeric_parameters(thing) and name not in ("LabelFile", "NiftiSlabs", "explain", "plan", "verify"):
            thing(**needed(name))  # what it needs is enough

"""Data of the organ comparison: who is in which part, crops around the organs, nnU-Net's dataset and plans."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np

NAME, NUMBER = "Dataset910_OpenKBP", 910
CONFIGURATION = "3d_fullres"
PLANNERS = ("ExperimentPlanner", "nnUNetPlannerResEncM")

SPLITS: dict[str, tuple[int, ...]] = {
    "train": (2, 9, 13, 17, 21, 22, 24, 30, 33, 36, 37, 40, 47, 54),
    "validation": (4, 16, 31, 48),
    "test": (1, 12, 20, 25, 34, 41),
}
"""Patients by the number in their file names. Settings are chosen on validation; nothing is chosen on test."""


def names_of(part: str, splits: Mapping[str, Sequence[int]] = SPLITS) -> list[str]:
    """Names of the patients of one part."""
    return [f"pt_{number}" for number in splits[part]]


def set_folders(work: Path, results: Path | None = None) -> None:
    """Tell nnU-Net its folders and our trainers; call it before anything of nnU-Net is imported."""
    from nnunet_plugins.environment import VARIABLE, ext_folder, is_listed

    folders = {"raw": work / "raw", "preprocessed": work / "preprocessed", "results": results or work / "results"}
    for part, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{part}"] = str(folder)
    if not is_listed():
        os.environ[VARIABLE] = os.pathsep.join(filter(None, [os.environ.get(VARIABLE), ext_folder()]))
    os.environ.setdefault("nnUNet_def_n_proc", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")


def prepare(
    work: Path,
    data: Path,
    crop: Sequence[int] | None,
    memory: float,
    splits: Mapping[str, Sequence[int]] = SPLITS,
) -> None:
    """Write the dataset, plan it with both planners for the same memory, and preprocess it once.

    Args:
        work: Folder for everything, new or empty.
        data: the OpenKBP folder: pt_N_ct.nii.gz, pt_N_oar.nii.gz and labels.json.
        crop: Extents of the box around the organs, in voxels; None keeps the whole image.
        memory: GB that a training step of a plan may take on a GPU by nnU-Net's reckoning.
        splits: Numbers of the patients of the parts train, validation and test.
    """
    write_dataset(work / "raw" / NAME, data, crop, splits)
    set_folders(work)
    os.environ.update(nnUNet_n_proc_DA="1")  # the planner's threads
    from nnunetv2.experiment_planning import plan_and_preprocess_api as nnunet

    with (work / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        nnunet.extract_fingerprints([NUMBER], num_processes=1, show_progress_bar=False)
        for planner in PLANNERS:
            nnunet.plan_experiments([NUMBER], planner, memory)
        nnunet.preprocess([NUMBER], configurations=(CONFIGURATION,), num_processes=(1,), show_progress_bar=False)
    fold = {"train": names_of("train", splits), "val": names_of("validation", splits)}
    (work / "preprocessed" / NAME / "splits_final.json").write_text(json.dumps([fold]))
    described = {
        "crop": crop and list(crop),
        "plan_gb": memory,
        "splits": {part: list(splits[part]) for part in splits},
    }
    (work / "setting.json").write_text(json.dumps(described))


def write_dataset(folder: Path, data: Path, crop: Sequence[int] | None, splits: Mapping[str, Sequence[int]]) -> None:
    """Write the raw dataset; test patients lie apart, so no plan and no statistic sees them."""
    if folder.exists():
        raise SystemExit(f"{folder} exists already: name another --work, or remove it.")
    for part, name in everyone(splits):
        kinds = ("imagesTs", "labelsTs") if part == "test" else ("imagesTr", "labelsTr")
        image, labels = (opened(data / f"{name}_{kind}.nii.gz") for kind in ("ct", "oar"))
        if crop is not None:
            box = around(np.asarray(labels.dataobj) > 0, crop)
            image, labels = image.slicer[box], labels.slicer[box]
        for kind, volume, ending in zip(kinds, (image, labels), ("_0000", ""), strict=True):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(volume, folder / kind / f"{name}{ending}.nii.gz")
    organs = json.loads((data / "labels.json").read_text())
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{organ: int(number) for number, organ in organs.items()}},
        "numTraining": len(splits["train"]) + len(splits["validation"]),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def everyone(splits: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str]]:
    """Part and name of every patient."""
    for part in splits:
        for name in names_of(part, splits):
            yield part, name


def opened(file: Path) -> nibabel.Nifti1Image:
    """One volume; ends with a line when it is not there."""
    if not file.exists():
        raise SystemExit(f"{file} is missing: name the folder of all OpenKBP patients of the splits with --data.")
    return nibabel.load(file)


def around(mask: np.ndarray, size: Sequence[int]) -> tuple[slice, ...]:
    """A box of a given size around the middle of a mask, moved to lie inside the volume."""
    where = np.argwhere(mask)
    middle = (where.min(0) + where.max(0)) // 2
    extents = [min(extent, wanted) for extent, wanted in zip(mask.shape, size, strict=True)]
    starts = [
        max(0, min(int(center) - extent // 2, whole - extent))
        for center, extent, whole in zip(middle, extents, mask.shape, strict=True)
    ]
    return tuple(slice(start, start + extent) for start, extent in zip(starts, extents, strict=True))

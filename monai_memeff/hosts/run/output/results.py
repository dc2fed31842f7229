"""A study's folder in the output: written whole or not at all, with a report; known again by what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from monai_memeff.data import atomic_write, save_nifti
from monai_memeff.errors import InputError
from monai_memeff.hosts.run.output.dicom_seg import Sources, write_seg
from monai_memeff.hosts.run.output.segments import Labels, labels_of
from monai_memeff.hosts.run.program import Prediction, Result
from monai_memeff.occupancy.mesh import labels_to_mesh, write_mesh

REPORT = "report.json"
REFUSED = ".refused.json"
PACKAGES = ("monai-memeff", "monai", "torch", "numpy", "pydicom", "highdicom")


def is_finished(folder: Path, key: str) -> bool:
    """Whether a folder holds the whole results of the same study, bundle and options.

    Raises:
        InputError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("key")
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{folder} holds something else than results of memeff run: give another --output") from None
    if found != key:
        raise InputError(
            f"{folder} holds results of another input, bundle, version or option: remove it, or give another --output"
        )
    return True


def write_results(
    folder: Path, prediction: Prediction, sources: Sources | None, bundle: dict[str, Any], report: dict[str, Any]
) -> dict[str, Any]:
    """Write all results and the report into a folder that takes its name when it is whole.

    Args:
        folder: Folder of the study.
        prediction: its results.
        sources: the images that DICOM SEG refers to; None writes NIfTI.
        bundle: name, version, outputs of the metadata and parameters of the algorithm.
        report: what is known so far.

    Returns:
        The report as it was written.

    Raises:
        InputError: a result cannot be written in this format.
    """
    work = _fresh(folder)
    try:
        files = []
        for result, name in zip(prediction.results, _file_names(prediction.results), strict=True):
            labels = labels_of(result, bundle["outputs"])
            if sources is None:
                files += _nifti(work, name, labels, prediction.affine)
            else:
                write_seg(
                    work / f"{name}.dcm", labels, sources, bundle["name"], bundle["version"], bundle["parameters"]
                )
                files.append({"file": f"{name}.dcm", **_contents(labels)})
            files += _surfaces(work, name, labels, prediction.affine)
        report = {**report, "results": [{**file, "sha256": _sha256(work / file["file"])} for file in files]}
        with atomic_write(work / REPORT) as file:
            file.write_text(json.dumps(report, indent=2, default=str), encoding="utf-8")
        os.replace(work, folder)
    except OSError:
        if not (folder.is_dir() and is_finished(folder, report["key"])):  # another process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    folder.with_name(folder.name + REFUSED).unlink(missing_ok=True)
    return report


def write_refusal(folder: Path, report: dict[str, Any]) -> None:
    """Write beside a study's folder why there is none."""
    with atomic_write(folder.with_name(folder.name + REFUSED)) as file:
        file.write_text(json.dumps(report, indent=2, default=str), encoding="utf-8")


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what the labels are."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _fresh(folder: Path) -> Path:
    """A new folder beside the target; what killed processes left of this study is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for entry in folder.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{12}}\.part", entry.name):
            shutil.rmtree(entry, ignore_errors=True)
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.part")
    work.mkdir()
    return work


def _file_names(results: Sequence[Result]) -> list[str]:
    if len(results) == 1:
        return ["segmentation"]
    names = [re.sub(r"[^\w.-]+", "_", result.name or result.key) for result in results]
    return names if len(set(names)) == len(names) else [f"{n}_{r.key}" for n, r in zip(names, results, strict=True)]


def _nifti(work: Path, name: str, labels: Labels, affine: np.ndarray) -> list[dict[str, Any]]:
    """One file, or one for each overlapping segment."""
    if labels.values.ndim == 3:
        save_nifti(work / f"{name}.nii.gz", labels.values, affine)
        return [{"file": f"{name}.nii.gz", **_contents(labels)}]
    files = []
    for number, part in enumerate(labels.values, 1):
        word = re.sub(r"[^\w.-]+", "_", labels.names.get(number, "")).strip("_")
        file = f"{name}_{number}{'_' + word if word else ''}.nii.gz"
        save_nifti(work / file, part, affine)
        one = Labels(part, {1: labels.names[number]} if number in labels.names else {}, labels.unnamed)
        files.append({"file": file, **_contents(one)})
    return files


def _surfaces(work: Path, name: str, labels: Labels, affine: np.ndarray) -> list[dict[str, Any]]:
    """An STL of every implant, to be printed: LPS millimeters, as viewers of DICOM take files."""
    files = []
    implants = {number: word for number, word in labels.names.items() if "implant" in word.lower().split()}
    for number in implants:
        mask = labels.values == number if labels.values.ndim == 3 else labels.values[number - 1] > 0
        if mask.any():
            file = f"{name}.stl" if len(implants) == 1 else f"{name}_{number}.stl"
            write_mesh(work / file, labels_to_mesh(mask, affine))
            files.append({"file": file, "surface of": implants[number]})
    return files


def _contents(labels: Labels) -> dict[str, Any]:
    """Names and voxels of every label."""
    values = labels.values
    if values.dtype.kind not in "iu":
        return {"values": str(values.dtype), "note": labels.unnamed}
    if values.ndim == 4:
        counts = {number: int(part.sum()) for number, part in enumerate(values, 1)}
    else:
        numbers, found = np.unique(values, return_counts=True)
        counts = {int(number): int(count) for number, count in zip(numbers, found, strict=True) if number != 0}
    every = sorted({*counts, *labels.names})
    segments = [{"label": n, "name": labels.names.get(n), "voxels": counts.get(n, 0)} for n in every]
    return {"segments": segments, **({"note": labels.unnamed} if labels.unnamed else {})}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

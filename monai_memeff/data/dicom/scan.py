"""What a folder holds: DICOM files sorted into series, one of them chosen, and nothing left out without a word."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_memeff.data.dicom.frames import Frame, frames_of, listed
from monai_memeff.data.nifti_checks import first_line, refuse_archive
from monai_memeff.errors import InputError

MOST_FILES = 20_000
"""A folder with more is not a series, but somebody's home."""

BESIDE = {"DICOMDIR", "LOCKFILE", "VERSION", "README", "LICENSE", "Thumbs.db", "desktop.ini"}
BESIDE_ENDINGS = {".txt", ".md", ".xml", ".json", ".csv", ".html", ".htm", ".pdf", ".jpg", ".jpeg", ".png", ".inf"}
"""Files that stand beside a series and are none of its slices; any other file that cannot be read is refused."""

NO_IMAGES = {"SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SR", "PR", "KO", "DOC", "REG", "ANN", "PLAN", "FID"}
"""Modalities of objects that belong to images and are none of them."""


CONVERTED = (
    "SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType", "PhotometricInterpretation", "SamplesPerPixel",
    "BitsAllocated", "BitsStored", "HighBit", "ModalityLUTSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip


@dataclass
class Series:
    """One series: its slices, and what a report says about what was left out."""

    uid: str
    modality: str
    frames: list[Frame]
    headers: dict[Path, Any]
    notes: list[str] = field(default_factory=list)


def choose_series(path: Path, uid: str | None = None) -> Series:
    """Read the headers of a file or folder, its folders included, and choose a series.

    Args:
        path: a DICOM file, or a folder.
        uid: ``SeriesInstanceUID``; needed where there are several.

    Raises:
        InputError: no series, several and no ``uid``, an unknown ``uid``, or a file that cannot be read.
    """
    headers, notes = _headers(path)
    series: dict[str, dict[Path, Any]] = {}
    for file, header in headers.items():
        series.setdefault(_plain(header.get("SeriesInstanceUID", "")), {})[file] = header
    images = {name: found for name, found in series.items() if not _is_no_image(found)}
    if uid is None:
        images = _without_localizers(images, notes)
    if not images:
        kinds = sorted({str(header.get("Modality", "unknown")) for header in headers.values()})
        raise InputError(f"cannot read {path}: it holds no DICOM images ({', '.join(kinds) or 'no DICOM file'}).")
    chosen = _choose(path, images, uid)
    others = sum(len(found) for name, found in series.items() if name != chosen)
    if others:
        notes.append(f"{others} files of other series were left out")
    if uid is not None:
        notes.append(f"the series {chosen} was chosen")
    return _series(path, chosen, images[chosen], notes)


def _headers(path: Path) -> tuple[dict[Path, Any], list[str]]:
    import pydicom

    files = [path] if path.is_file() else _files(path)
    headers: dict[Path, Any] = {}
    beside: list[str] = []
    for file in files:
        if path.is_dir() and (file.name.startswith(".") or file.name in BESIDE or _ends_as_text(file)):
            beside.append(file.name)
            continue
        try:
            headers[file] = pydicom.dcmread(file, stop_before_pixels=True)
            for keyword in CONVERTED:  # wrong values are met here, not later
                headers[file].get(keyword)
        except pydicom.errors.InvalidDicomError:
            refuse_archive(file)
            raise InputError(f"cannot read {file}: it is no DICOM file; remove it, or copy the series again.") from None
        except Exception as error:
            raise InputError(
                f"cannot read {file} as DICOM: {first_line(error)}; remove it, or copy the series again."
            ) from error
    more = ", ..." if len(beside) > 3 else ""
    return headers, [f"{len(beside)} files that are not slices were left out: {', '.join(beside[:3])}{more}"] * bool(
        beside
    )


def _plain(value: Any) -> str:
    """A value as it can stand in one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value).strip())[:64]


def _files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for place, _, names in os.walk(folder, onerror=_refuse):
        for path in (Path(place, name) for name in names):
            if path.is_symlink() and not path.exists():
                raise InputError(f"{path} is a link to nothing, and may have been a slice: copy the series again.")
            if path.is_file():
                files.append(path)
        if len(files) > MOST_FILES:
            raise InputError(f"{folder} holds more than {MOST_FILES} files; give the folder of one series.")
    if not files:
        raise InputError(f"{folder} is empty: copy the series again, or give another folder.")
    return sorted(files)


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed may hold slices."""
    raise error


def _ends_as_text(file: Path) -> bool:
    return file.suffix.lower() in BESIDE_ENDINGS


def _is_no_image(series: dict[Path, Any]) -> bool:
    return all(str(header.get("Modality", "")) in NO_IMAGES for header in series.values())


def _without_localizers(images: dict[str, dict[Path, Any]], notes: list[str]) -> dict[str, dict[Path, Any]]:
    """Without series that are localizers and nothing else, where there are others."""
    kept = {name: found for name, found in images.items() if not all("LOCALIZER" in _types(h) for h in found.values())}
    if not kept or len(kept) == len(images):
        return images
    notes.append(f"{len(images) - len(kept)} series of localizer images were left out")
    return kept


def _choose(path: Path, images: dict[str, dict[Path, Any]], uid: str | None) -> str:
    if uid is None and len(images) == 1:
        return next(iter(images))
    if uid in images:
        return str(uid)
    names = "; ".join(f"{name or 'without UID'} ({_description(found)})" for name, found in sorted(images.items())[:6])
    if uid is None:
        raise InputError(
            f"cannot read {path}: it holds {len(images)} series, and one is needed: {names}; choose one by its UID "
            "(series=, --series), or give its own folder."
        )
    raise InputError(f"cannot read {path}: it holds no series {uid}; there are {names}.")


def _description(found: dict[Path, Any]) -> str:
    header = next(iter(found.values()))
    said = _plain(header.get("SeriesDescription", ""))[:40]
    return f"{header.get('Modality', 'unknown')}{', ' + said if said else ''}, {len(found)} files"


def _series(path: Path, uid: str, headers: dict[Path, Any], notes: list[str]) -> Series:
    modalities = sorted({str(header.get("Modality", "unknown")) for header in headers.values()})
    if len(modalities) > 1:
        raise InputError(f"cannot read {path}: one series holds {', '.join(modalities)}; export the series again.")
    if not uid:
        notes.append("the images name no series, so they were taken for one")
    localizers = [file for file, header in headers.items() if "LOCALIZER" in _types(header)]
    if localizers and len(localizers) < len(headers):
        shown = ", ".join(file.name for file in localizers[:3]) + (", ..." if len(localizers) > 3 else "")
        notes.append(f"{len(localizers)} localizer images were left out: {shown}")
        headers = {file: header for file, header in headers.items() if file not in localizers}
    elif localizers:
        raise InputError(f"cannot read {path}: it holds localizer images only; give the series of slices.")
    frames = [frame for file, header in headers.items() for frame in frames_of(file, header)]
    if len(frames) < 2:
        raise InputError(
            f"cannot read {path}: {listed(frames)} is a single slice; give the folder of the whole series."
        )
    return Series(uid, modalities[0], frames, headers, notes)


def _types(header: Any) -> list[str]:
    found = header.get("ImageType") or []
    return [found] if isinstance(found, str) else [str(word) for word in found]

"""Which studies an input holds: one series, a folder of them, or volumes, each with a name of its own."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_memeff.data.dicom.scan import BESIDE, BESIDE_ENDINGS, NO_IMAGES
from monai_memeff.data.nifti_checks import ENDINGS, first_line
from monai_memeff.data.volume import DICOM_ENDINGS, ITK_ENDINGS
from monai_memeff.errors import InputError, message

VOLUMES = (*ENDINGS, *ITK_ENDINGS)
COMPANIONS = (".raw", ".zraw", ".raw.gz")
"""Files with the voxels of a header beside them."""


@dataclass(frozen=True)
class Study:
    """What is read, worked on and written as one.

    Attributes:
        name: Name of its folder in the output.
        images: a file or DICOM folder for each image that the bundle reads.
        dicom: whether it is a DICOM series.
        fault: why it cannot be worked on; empty when nothing is known against it.
    """

    name: str
    images: tuple[Path, ...]
    dicom: bool = False
    fault: str = ""

    def files(self) -> list[Path]:
        """All files that it is read from."""
        return sorted(file for image in self.images for file in ([image] if image.is_file() else _below(image)))

    def fingerprint(self) -> str:
        """What changes when one of its files does: names, sizes and times of change."""
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files()]
        return hashlib.sha256(repr(stats).encode()).hexdigest()


def find_studies(inputs: Sequence[Path], image_names: Sequence[str], series: str | None = None) -> list[Study]:
    """The studies of files and folders, sorted by name.

    A folder that holds slices is one study, and so is every volume file; folders are searched. A bundle that reads
    several images takes from each folder one volume file for each of them, whose name has the image's name as a word.

    Args:
        inputs: files and folders.
        image_names: names of the images that the bundle reads.
        series: ``SeriesInstanceUID``; then a folder is one study that holds this series.

    Raises:
        InputError: an input does not exist, holds nothing, or two studies would have the same name.
    """
    for path in inputs:
        if not path.exists():
            raise InputError(f"no such input: {path}: give a DICOM folder, a folder of studies, or NIfTI or NRRD files")
    if len(image_names) > 1:
        found = _several(inputs, image_names)
    elif series is not None:
        found = [Study(_name(path, path), (path,), True) for path in inputs]
    else:
        found = [study for path in inputs for study in _single(path)]
        found = _without_split_series(found)
    if not found:
        raise InputError(f"{inputs[0]} holds no study: no volume file and no folder of DICOM images")
    return _named_apart(found)


def _single(root: Path) -> Iterator[Study]:
    if root.is_file():
        yield Study(_name(root, root), (root,), not root.name.lower().endswith(VOLUMES))
        return
    for folder, files in _folders(root):
        if isinstance(files, OSError):
            yield Study(_name(root, folder), (folder,), True, message(files))
            continue
        volumes = [file for file in files if _is_volume(file)]
        for file in volumes:
            yield Study(_name(root, file), (file,))
        slices = [file for file in files if not _is_volume(file) and not _is_companion(file)]
        if any(file.name.lower().endswith(DICOM_ENDINGS) for file in slices) or (slices and not volumes):
            yield Study(_name(root, folder), (folder,), True)


def _several(inputs: Sequence[Path], image_names: Sequence[str]) -> list[Study]:
    """One volume file for each image, told apart by words in their names."""
    groups = [(path, folder, files) for path in inputs if path.is_dir() for folder, files in _folders(path)]
    single = [path for path in inputs if path.is_file()]
    found = [
        Study(_name(root, folder), (folder,), fault=message(files))
        if isinstance(files, OSError)
        else _grouped(_name(root, folder), files, image_names)
        for root, folder, files in groups
    ]
    if single:
        found.append(_grouped(_name(single[0].parent, single[0].parent), single, image_names))
    return [study for study in found if study is not None]


def _grouped(name: str, files: Sequence[Path], image_names: Sequence[str]) -> Study | None:
    volumes = [file for file in files if _is_volume(file)]
    if not volumes:
        return None
    matches = {image: [file for file in volumes if _has_word(file, image)] for image in image_names}
    wrong = [f"{len(files)} for {image}" for image, files in matches.items() if len(files) != 1]
    chosen = tuple(files[0] for files in matches.values() if files)
    if wrong or len(set(chosen)) < len(image_names):
        fault = (
            f"the bundle reads {len(image_names)} images, {', '.join(image_names)}, each from one NIfTI or NRRD file "
            f"with that word in its name, and there are {', '.join(wrong) or 'files with two'}: rename the files"
        )
        return Study(name, tuple(volumes), fault=fault)
    return Study(name, chosen)


def _without_split_series(studies: Sequence[Study]) -> list[Study]:
    """Folders without images are left out; a series that lies in several folders is not a study in any of them."""
    places: dict[str, list[Study]] = {}
    kept = []
    for study in studies:
        listed = study.dicom and not study.fault and study.images[0].is_dir()
        found = _series_in(study.images[0]) if listed else None
        if found == {}:
            continue
        kept.append(study)
        for uid in found or ():
            places.setdefault(uid, []).append(study)
    split = {id(study): (uid, held) for uid, held in places.items() if len(held) > 1 for study in held}
    return [_faulty(study, *split[id(study)]) if id(study) in split else study for study in kept]


def _faulty(study: Study, uid: str, held: Sequence[Study]) -> Study:
    names = ", ".join(str(other.images[0]) for other in held[:3])
    fault = f"the series {uid} lies in {len(held)} folders ({names}): bring it into one, or choose it by --series"
    return Study(study.name, study.images, study.dicom, fault)


def _series_in(folder: Path) -> dict[str, str] | None:
    """Series of images among a folder's own files; None where a file is no DICOM, which its reader will refuse."""
    import pydicom

    found = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and not _is_beside(file):
            try:
                header: Any = pydicom.dcmread(
                    file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "Modality"]
                )
                if str(header.get("Modality", "")) not in NO_IMAGES:
                    found[str(header.get("SeriesInstanceUID", ""))] = str(folder)
            except Exception as error:  # pydicom knows many ways to fail
                first_line(error)
                return None
    return found


def _folders(root: Path) -> Iterator[tuple[Path, list[Path] | OSError]]:
    """Folders in order with files that may belong to a study, links followed once; last those that are shut."""
    seen, unread = set(), list[OSError]()
    for folder, below, names in os.walk(root, followlinks=True, onerror=unread.append):
        place = os.path.realpath(folder)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        below[:] = sorted(name for name in below if not name.startswith("."))
        files = [Path(folder, name) for name in sorted(names)]
        yield Path(folder), [file for file in files if _is_file_or_was(file) and not _is_beside(file)]
    yield from ((Path(error.filename), error) for error in unread)


def _is_file_or_was(file: Path) -> bool:
    """Whether it is a file, or a link to nothing, which its reader refuses by name."""
    return file.is_file() or (file.is_symlink() and not file.exists())


def _below(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _is_volume(file: Path) -> bool:
    """Whether a file is a volume by its name; of a pair of header and voxels the header."""
    name = file.name.lower()
    if name.endswith((".img", ".img.gz")):
        return not any(file.with_name(re.sub(r"(?i)\.img", end, file.name)).exists() for end in (".hdr", ".HDR"))
    return name.endswith(VOLUMES)


def _is_companion(file: Path) -> bool:
    return file.name.lower().endswith((*COMPANIONS, ".img", ".img.gz"))


def _is_beside(file: Path) -> bool:
    return file.name.startswith(".") or file.name in BESIDE or file.suffix.lower() in BESIDE_ENDINGS


def _has_word(file: Path, name: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", _stem(file).lower()) if word]
    wanted = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _stem(path: Path) -> str:
    endings = sorted((*VOLUMES, *DICOM_ENDINGS), key=len, reverse=True)
    ending = next((end for end in endings if path.name.lower().endswith(end)), "")
    ending = "" if path.is_dir() else ending
    return path.name[: len(path.name) - len(ending)] or path.name


def _name(root: Path, path: Path) -> str:
    """The place below the root in one word; the root's own name where the study is the root."""
    if path == root:
        return _stem(root.resolve()) or "study"
    *folders, _ = path.relative_to(root).parts
    return "_".join([*folders, _stem(path)])


def _named_apart(studies: Sequence[Study]) -> list[Study]:
    known: dict[str, Study] = {}
    for study in sorted(studies, key=lambda study: study.name):
        other = known.setdefault(study.name.lower(), study)
        if other is not study:
            raise InputError(
                f"{other.images[0]} and {study.images[0]} would both be written as {study.name}: rename one, or "
                "run them into different outputs"
            )
    return list(known.values())

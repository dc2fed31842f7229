"""What the bundles' configurations need in a data folder: files in pairs, or an end in one line."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from glob import glob
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def require_files(files: Sequence[Any], what: str, folder: str, pattern: str | None = None) -> None:
    """End the program where no file was found.

    Args:
        files: What was found.
        what: What a file shows.
        folder: Where it was looked for.
        pattern: Which names were looked for; None: all in the folder.

    Raises:
        SystemExit: there is no file; with one line that names the folder and the options to set.

    Examples:
        >>> require_files(["head.nii.gz"], "skull", "/data", "*.nii.gz")
        >>> require_files([], "skull", "/data", "*.nii.gz")
        Traceback (most recent call last):
        SystemExit: no skull: nothing matches /data/*.nii.gz; set --dataset_dir and --pattern
    """
    if files:
        return
    if pattern is None:
        raise SystemExit(f"no {what}: nothing in {folder}; set --dataset_dir")
    raise SystemExit(f"no {what}: nothing matches {os.path.join(folder, pattern)}; set --dataset_dir and --pattern")


def checked_option(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, whole: bool = False, count: int = 0
) -> Any:
    """The value of an option, for the place of a configuration that uses it; ends the program where it is out of range.

    Args:
        name: Name of the option.
        value: what it was set to.
        least: the smallest value that can be meant.
        most: the largest.
        whole: whether it is a whole number.
        count: Length of the list; 0 for a single number.

    Raises:
        SystemExit: it is not a number, NaN or outside the range; with one line that names the option.

    Examples:
        >>> checked_option("grid", 64, 1, whole=True)
        64
        >>> checked_option("pixdim", [1, 1, 0], 0.1, count=3)
        Traceback (most recent call last):
        SystemExit: --pixdim must be 3 numbers of at least 0.1, got [1, 1, 0]
    """
    kind: Any = Integral if whole else Real
    numbers = list(value) if count and isinstance(value, (list, tuple)) else [value]
    fine = all(isinstance(n, kind) and math.isfinite(n) and least <= n <= most for n in numbers)
    if not fine or len(numbers) != max(count, 1):
        low = "" if least == -math.inf else f" of at least {least:g}" if most == math.inf else f" from {least:g}"
        bounds = low if most == math.inf else f"{low} to {most:g}"
        words = f"{count} {'whole ' if whole else ''}numbers" if count else f"a {'whole ' if whole else ''}number"
        raise SystemExit(f"--{name} must be {words}{bounds}, got {value!r}")
    return value


def checked_window(name: str, value: Any) -> Any:
    """Both ends of a window of intensities, for the place of a configuration that uses them.

    Args:
        name: Name of the option.
        value: what it was set to.

    Raises:
        SystemExit: they are not two numbers, or the second is not the larger one.

    Examples:
        >>> checked_window("window", [-100, 300])
        [-100, 300]
    """
    low, high = checked_option(name, value, count=2)
    if not low < high:
        raise SystemExit(f"--{name} must be a lower and a higher number, got {value!r}")
    return value


def require_pairs(images: Sequence[str], labels: Sequence[str], folder: str) -> None:
    """End the program where images and labels do not come in pairs.

    The files of one place in both lists are a pair. What all names of a list begin and end with is not part of a case's
    name, such as ``volume-``, and neither is nnU-Net's ``_0000``; what remains must be the same for both.

    Args:
        images: Files of ``imagesTr``.
        labels: Files of ``labelsTr``, in the images' order.
        folder: The folder of both.

    Raises:
        SystemExit: their numbers differ, there are none, or a label has another case's name; with one line.

    Examples:
        >>> require_pairs(["a_0000.nii.gz", "b_0000.nii.gz"], ["a.nii.gz", "b.nii.gz"], "data")
        >>> require_pairs(["volume-7.nii"], ["segmentation-7.nii"], "data")
        >>> require_pairs(["a.nii", "b.nii"], ["b.nii", "c.nii"], "data")
        Traceback (most recent call last):
        SystemExit: images and labels must sort alike, and a.nii of imagesTr comes with b.nii of labelsTr in data: ...
    """
    if not 0 < len(images) == len(labels):
        raise SystemExit(
            f"images and labels must come in pairs, found {len(images)} in imagesTr and {len(labels)} in labelsTr"
            f" of {folder}; set --dataset_dir"
        )
    (ours, common), (theirs, other) = _case_names(images), _case_names(labels)
    alike = common == other or not (common and other)
    for image, label, one, two in zip(images, labels, ours, theirs, strict=True):
        if one != two or not alike:
            raise SystemExit(
                f"images and labels must sort alike, and {os.path.basename(image)} of imagesTr comes with "
                f"{os.path.basename(label)} of labelsTr in {folder}: give every label the name of its image"
            )


def _case_names(files: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """What tells the files of a folder apart, as letters and numbers, and the numbers that all of them share."""
    parts = [re.findall(r"\d+|\D", _stem(file).removesuffix("_0000")) for file in files]
    first = _shared(parts)
    rest = [part[first:] for part in parts]
    last = _shared([part[::-1] for part in rest])
    shared = parts[0][:first] + rest[0][len(rest[0]) - last :]
    return [part[: len(part) - last] for part in rest], [part for part in shared if part.isdigit()]


def _stem(file: str) -> str:
    """Name of a file without its ending, .nii.gz as a whole."""
    return os.path.splitext(os.path.basename(file).removesuffix(".gz"))[0]


def _shared(lists: Sequence[list[str]]) -> int:
    """How many items all lists begin with."""
    alike = (len(set(items)) == 1 for items in zip(*lists, strict=False))
    return sum(itertools.takewhile(bool, alike))


def pair_by_name(images: Sequence[str], folder: str | None, key: str) -> list[dict[str, str]]:
    """Cases for a dataset: every image, with the file of the same name in another folder.

    Args:
        images: Files under the key ``image``.
        folder: Where the other files are; None leaves them out.
        key: Key of the other files.

    Returns:
        One dictionary per image.

    Examples:
        >>> pair_by_name(["images/a.nii.gz"], "labels", "label")
        [{'image': 'images/a.nii.gz', 'label': 'labels/a.nii.gz'}]
    """
    if folder is None:
        return [{"image": image} for image in images]
    return [{"image": image, key: os.path.join(folder, os.path.basename(image))} for image in images]


def require_named(images: Sequence[str], folder: str | None, what: str, option: str) -> None:
    """End the program where a folder lacks files of the images' names.

    Args:
        images: Image files.
        folder: Where files of the same names should be; None: there are none.
        what: What those show.
        option: The option that gives the folder.

    Raises:
        SystemExit: some are missing; with one line that names the first and their number.

    Examples:
        >>> require_named(["images/a.nii.gz"], None, "label", "--label_dir")
        >>> require_named(["images/a.nii.gz"], "labels", "label", "--label_dir")
        Traceback (most recent call last):
        SystemExit: no label of the name a.nii.gz in labels, 1 of 1 images have none; set --label_dir
    """
    cases = pair_by_name(images, folder, "other")
    missing = [case["other"] for case in cases if "other" in case and not os.path.exists(case["other"])]
    if missing:
        raise SystemExit(
            f"no {what} of the name {os.path.basename(missing[0])} in {folder}, {len(missing)} of {len(images)} images"
            f" have none; set {option}"
        )


def newest_file(folder: str, pattern: str) -> str | None:
    """The file of a folder that was written last, or None.

    Args:
        folder: Where to look.
        pattern: Which names, as ``glob`` takes them.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pathlib.Path(folder, "checkpoint_1.pt").touch()
        ...     pathlib.Path(newest_file(folder, "*.pt")).name
        'checkpoint_1.pt'
    """
    return max(glob(os.path.join(folder, pattern)), key=os.path.getmtime, default=None)


def require_checkpoint(file: str | Path | None, folder: str, pattern: str, resume: bool = True) -> None:
    """End the program where a training is to be resumed and there is no checkpoint.

    Args:
        file: The newest checkpoint, or None.
        folder: Where it was looked for.
        pattern: Which names were looked for.
        resume: Whether one is needed.

    Raises:
        SystemExit: it is needed and not there.

    Examples:
        >>> require_checkpoint("models/checkpoint_1.pt", "models", "checkpoint_*.pt")
        >>> require_checkpoint(None, "models", "checkpoint_*.pt")
        Traceback (most recent call last):
        SystemExit: nothing to resume: no checkpoint_*.pt in models; start without --resume
    """
    if resume and not file:
        raise SystemExit(f"nothing to resume: no {pattern} in {folder}; start without --resume")

"""What the bundles' configurations need in a data folder: files in pairs, or an end in one line."""

from __future__ import annotations

import math
import os
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

    Example::

        require_files(["head.nii.gz"], "skull", "/data", "*.nii.gz")
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

    Example::

        checked_option("grid", 64, 1, whole=True)
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
    """
    low, high = checked_option(name, value, count=2)
    if not low < high:
        raise SystemExit(f"--{name} must be a lower and a higher number, got {value!r}")
    return value


def require_pairs(images: Sequence[str], labels: Sequence[str], folder: str) -> None:
    """End the program where images and labels do not come in pairs.

    Args:
        images: Files of ``imagesTr``.
        labels: Files of ``labelsTr``.
        folder: The folder of both.

    Raises:
        SystemExit: their numbers differ, or there are none.
    """
    if not 0 < len(images) == len(labels):
        raise SystemExit(
            f"images and labels must come in pairs, found {len(images)} in imagesTr and {len(labels)} in labelsTr"
            f" of {folder}; set --dataset_dir"
        )


def pair_by_name(images: Sequence[str], folder: str | None, key: str) -> list[dict[str, str]]:
    """Cases for a dataset: every image, with the file of the same name in another folder.

    Args:
        images: Files under the key ``image``.
        folder: Where the other files are; None leaves them out.
        key: Key of the other files.

    Returns:
        One dictionary per image.
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
    """
    if resume and not file:
        raise SystemExit(f"nothing to resume: no {pattern} in {folder}; start without --resume")

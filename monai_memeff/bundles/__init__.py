"""The bundles that are installed with the package: their names, what they are for, and copies to work in."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from monai_memeff.bundles.inputs import (
    checked_option,
    checked_window,
    newest_file,
    pair_by_name,
    require_checkpoint,
    require_files,
    require_named,
    require_pairs,
)
from monai_memeff.bundles.record import WeightsRecord
from monai_memeff.errors import InputError

__all__ = [
    "WeightsRecord",
    "bundle_names",
    "bundle_path",
    "bundle_task",
    "checked_option",
    "checked_window",
    "copy_bundle",
    "newest_file",
    "pair_by_name",
    "require_checkpoint",
    "require_files",
    "require_named",
    "require_pairs",
]

METADATA = Path("configs", "metadata.json")
HERE = Path(__file__).parent
LEFT_OUT = {"__pycache__", "eval"}
"""Folders that running a bundle in a checkout leaves there, which are not part of it."""


def bundle_names() -> list[str]:
    """Names of the installed bundles, sorted.

    Examples:
        >>> "liver_tumor_halo" in bundle_names()
        True
    """
    return sorted(file.parents[1].name for file in _root().glob(f"*/{METADATA.as_posix()}"))


def bundle_path(name: str) -> Path:
    """Where a bundle is installed; copy it to work in it (:func:`copy_bundle`).

    Args:
        name: one of :func:`bundle_names`.

    Returns:
        The folder that holds ``configs``, ``docs`` and, where weights are shipped, ``models``.

    Raises:
        InputError: there is no bundle of that name.

    Examples:
        >>> (bundle_path("liver_tumor_halo") / "configs" / "train.json").is_file()
        True
    """
    if name not in bundle_names():
        raise InputError(f"no bundle is called {name!r}: choose one of {', '.join(bundle_names())}")
    return _root() / name


def bundle_task(name: str) -> str:
    """What a bundle is for, in one line, as its metadata says.

    Raises:
        InputError: there is no bundle of that name.

    Examples:
        >>> bundle_task("liver_tumor_halo")
        'Segmentation of liver and liver tumors in CT, whole volume at once'
    """
    return str(json.loads((bundle_path(name) / METADATA).read_text(encoding="utf-8"))["task"])


def copy_bundle(name: str, folder: str | os.PathLike[str]) -> Path:
    """Copy a bundle with all its files; an error or an interrupt leaves nothing of the copy.

    Args:
        name: one of :func:`bundle_names`.
        folder: the copy's folder, new or empty; folders above it are made.

    Returns:
        The absolute path of the copy.

    Raises:
        InputError: there is no bundle of that name, or the folder holds something or is a file.
        OSError: the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     copy = copy_bundle("skull_completion_sparse", f"{folder}/here")
        ...     (copy / "configs" / "train.json").is_file()
        True
    """
    source, target = bundle_path(name), Path(folder).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, and a folder is to be written there: give another name")
    existed = target.is_dir()
    if existed and any(target.iterdir()):
        raise InputError(f"{target} is not empty: give a new or an empty folder")
    made = [] if existed else [parent for parent in target.parents if not parent.exists()]
    # an empty folder may be the working directory or a mount: it is filled, not replaced
    work = (target if existed else target.parent) / f".{target.name}.{secrets.token_hex(6)}.part"
    try:
        _copy_writable(source, work)
        if existed:
            _move_up(work)
        else:
            os.replace(work, target)
    except BaseException:
        _clear(target if existed else work, [work, *made])
        raise
    return target


def _copy_writable(source: Path, target: Path) -> None:
    """Copy contents, not permissions: an installed package may be read-only, a copy is to be worked in."""
    for folder, below, files in os.walk(source):
        below[:] = sorted(set(below) - LEFT_OUT)
        copy = target / Path(folder).relative_to(source)
        copy.mkdir(parents=True)
        for file in files:
            shutil.copyfile(Path(folder, file), copy / file)


def _move_up(folder: Path) -> None:
    """Move what a folder holds beside it, and remove it."""
    for entry in folder.iterdir():
        os.replace(entry, folder.parent / entry.name)
    folder.rmdir()


def _clear(folder: Path, empty: Iterable[Path]) -> None:
    """Remove what a folder holds, and the folders that were made for it."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for made in empty:
        if made.is_dir():
            made.rmdir()


def _root() -> Path:
    """Beside this file in a wheel; at the top of a checkout, where an editable install finds them too."""
    return HERE if any(HERE.glob(f"*/{METADATA.as_posix()}")) else HERE.parents[1] / "bundles"

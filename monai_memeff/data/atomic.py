"""Writing all or nothing: a temporary file beside the target that takes its name when it is whole."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from monai_memeff.errors import InputError

SUFFIX = ".part"
"""Ending of temporary files: no reader takes such a file for an image, a checkpoint or a configuration."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name of a temporary file that becomes ``path`` when the block ends, and vanishes when it fails.

    The temporary file lies in the folder of ``path``, which is made if it is absent, and its name ends in ``.part``:
    what a killed process leaves behind is loaded by nobody. Writers that choose a format by the name need it by word.

    Args:
        path: the file to write; an existing one is replaced at once.
        sources: files that the content is made from; none of them may be ``path``.

    Raises:
        InputError: ``path`` is one of the sources, or a folder.
        OSError: the folder cannot be written.

    Examples:
        >>> with atomic_write("report.json") as work:
        ...     characters = work.write_text("{}")
        >>> open("report.json").read()
        '{}'
    """
    path = Path(path)
    check_other_file(path, *sources)
    if path.is_dir():
        raise InputError(f"{path} is a folder, and a file is to be written there: give another name.")
    target = Path(os.path.realpath(path))  # a link stays a link to the new content
    work = temporary_beside(target)
    try:
        yield work
        _flush(work)
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)


def temporary_beside(target: Path) -> Path:
    """An empty new file in the target's folder, with the permissions of the file it replaces, or of any new file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}{SUFFIX}"
    work.touch(exist_ok=False)
    if target.exists():
        work.chmod(target.stat().st_mode & 0o777)
    return work


def check_other_file(target: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Refuse to write a file over one that the content is made from, by whatever name or link it is reached.

    Raises:
        InputError: the target is one of the sources.

    Examples:
        >>> check_other_file("result.nii", "head.nii")
        >>> check_other_file("head.nii", "head.nii")
        Traceback (most recent call last):
        monai_memeff.errors.InputError: head.nii is the input itself and would be destroyed: give another name.
    """
    for source in sources:
        if os.path.realpath(target) == os.path.realpath(source) or _same_inode(target, source):
            raise InputError(f"{os.fspath(target)} is the input itself and would be destroyed: give another name.")


def _same_inode(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _flush(path: Path) -> None:
    """Bring the content to the disk before the name: after a power cut the name never stands on an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

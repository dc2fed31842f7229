"""Result files that are there when they are complete, and not before."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

PREFIX = ".memeff-incomplete-"
NEW = ".memeff-new-"


@contextmanager
def complete_files(truncated: str, last: str = "") -> Iterator[str]:
    """Give a name in a hidden folder to write ``<name>.*`` under; when all is written, the files move to ``truncated``.

    The folder lies beside the result and is removed on any error. When its process is killed, the next export into the
    same place removes it.

    Args:
        truncated: Path of the result without its file ending.
        last: Ending of the file that moves last, by which nnU-Net knows that a case is done.
    """
    target = Path(truncated)
    remove_abandoned(target.parent)
    folder, lock = _locked_folder(target.parent)
    try:
        yield str(folder / target.name)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name + last):
            _place(file, target.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _place(file: Path, target: Path) -> None:
    """Move a file to its name; where that is a link, its bytes go to what the link names, as nnU-Net writes them."""
    if target.is_symlink():
        shutil.copyfile(file, target)
    else:
        os.replace(file, target)


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    """A new folder that is locked before it has the name under which others look for abandoned ones."""
    try:
        new = Path(tempfile.mkdtemp(prefix=NEW, dir=parent))
    except OSError as error:  # by the name that the user knows
        raise type(error)(error.errno, error.strerror, str(parent)) from None
    lock = _lock(new)
    folder = parent / new.name.replace(NEW, PREFIX)
    os.rename(new, folder)
    return folder, lock


def remove_abandoned(parent: Path) -> None:
    """Remove the hidden folders of processes that were killed."""
    for folder in parent.glob(PREFIX + "*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    for folder in parent.glob(NEW + "*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > 60:
                folder.rmdir()


def _lock(folder: Path) -> int | None:
    """Lock a folder until the process ends; None when another process holds it, or locks do not exist here."""
    if fcntl is None:
        return None
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    if descriptor is not None:
        os.close(descriptor)
    return None

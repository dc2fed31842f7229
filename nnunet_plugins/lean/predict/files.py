"""Scratch files: space on a disk, reserved at once, that vanishes with the process that uses it, even when killed."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

FOLDER_VARIABLE = "MEMEFF_NNUNET_TMP"
SPARE = 64 * 2**20
"""Bytes that stay free on a disk whose room is counted."""


class NoRoomError(OSError):
    """No folder has room for a scratch file."""


class ScratchFile:
    """Bytes on disk without a name: the system frees them when the last process that holds the file ends.

    Args:
        size: Number of bytes, reserved now, so that a full disk is met before work starts.
        descriptor: Of an open scratch file, which this object then owns; None makes a new one.

    Raises:
        NoRoomError: in one line, with the folders tried and the way out.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self.size = size
        self.descriptor = reserve(size) if descriptor is None else descriptor

    def __del__(self) -> None:
        if getattr(self, "descriptor", None) is not None:
            os.close(self.descriptor)

    def write(self, offset: int, values: np.ndarray) -> None:
        """Write a contiguous array at an offset in bytes."""
        view = _bytes(np.ascontiguousarray(values))
        while view:
            done = os.pwrite(self.descriptor, view, offset)
            view, offset = view[done:], offset + done

    def read(self, offset: int, out: np.ndarray) -> np.ndarray:
        """Fill a contiguous array from an offset in bytes; returns it."""
        view = _bytes(out)
        while view:
            done = os.preadv(self.descriptor, [view], offset)
            if done == 0:
                raise OSError("a scratch file of lean prediction ended too early.")
            view, offset = view[done:], offset + done
        return out

    def map(self) -> mmap.mmap:
        """The bytes as shared memory; what is written there is in the file at once."""
        return mmap.mmap(self.descriptor, self.size)


def _bytes(values: np.ndarray) -> memoryview:
    """The bytes of a contiguous array; memoryview itself cannot give those of an empty one."""
    return memoryview(values).cast("B") if values.size else memoryview(b"")


def reserve(size: int) -> int:
    """Open a nameless file of ``size`` bytes in the first folder with room; returns its descriptor."""
    tried = []
    for folder in folders():
        try:
            free = shutil.disk_usage(folder).free
            if free - SPARE >= size:
                return _reserved_in(folder, size)
            tried.append(f"{folder} has {in_words(free)} free, of which {in_words(SPARE)} stay free")
        except OSError as error:
            tried.append(f"{folder}: {error.strerror or error}")
    raise NoRoomError(
        f"lean prediction needs {in_words(size)} of disk for logits, and {'; '.join(tried) or 'no folder'}: "
        f"free some, or set {FOLDER_VARIABLE} to a folder with room."
    )


def in_words(size: int) -> str:
    """A number of bytes as people read it."""
    unit = next((n for n in (30, 20, 10) if size >= 2**n), 0)
    return f"{size / 2**unit:.1f} { {30: 'GiB', 20: 'MiB', 10: 'KiB'}[unit] }" if unit else f"{size} bytes"


def _reserved_in(folder: str, size: int) -> int:
    descriptor, name = tempfile.mkstemp(prefix="memeff-", dir=folder)
    try:
        os.unlink(name)
        os.truncate(descriptor, size)
        if hasattr(os, "posix_fallocate"):
            _allocate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # file systems that reserve nothing
            raise


def folders() -> list[str]:
    """Where scratch files may go, best first: the user's choice alone, or disks before file systems in memory."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return [chosen]
    candidates = ["/var/tmp", os.getcwd()]
    with suppress(OSError):  # no folder can be written to
        candidates.insert(0, tempfile.gettempdir())
    memory = _memory_mounts()
    return sorted((c for c in dict.fromkeys(candidates) if os.path.isdir(c)), key=lambda c: _mount_of(c) in memory)


def roomiest() -> str:
    """The folder with most room for scratch files, on a disk where there is one that can be written to."""
    memory = _memory_mounts()

    def order(folder: str) -> tuple[bool, bool, int]:
        return not os.access(folder, os.W_OK), _mount_of(folder) in memory, -shutil.disk_usage(folder).free

    found = folders()
    return min(found, key=order) if len(found) > 1 else found[0]


def _memory_mounts() -> set[str]:
    try:
        rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:  # not Linux
        return set()
    return {row[1] for row in rows if len(row) > 2 and row[2] in ("tmpfs", "ramfs")}


def _mount_of(folder: str) -> str:
    path = os.path.realpath(folder)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def supported() -> str | None:
    """Say why this system has no such files; None when it has."""
    needed: tuple[Any, ...] = tuple(getattr(os, name, None) for name in ("pwrite", "preadv"))
    if os.name != "posix" or None in needed:
        return "lean prediction needs files that can be used after their name is removed, which this system has not"
    return None

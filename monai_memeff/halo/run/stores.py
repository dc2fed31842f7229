"""Where whole tensors wait while their tiles are computed: host memory, or files of a folder that never have a name."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from monai_memeff.halo.run.pinned import PinnedBlocks


class Store(Protocol):
    """Gives out whole tensors; one is given back by forgetting it."""

    def reserve(self, nbytes: int) -> None:
        """Raise an error of one line if so many bytes cannot be stored at once."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A whole tensor of any content."""


class HostStore:
    """Host memory, locked if the device is a GPU.

    Args:
        device: where the tiles are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks = PinnedBlocks(0, device)

    def reserve(self, nbytes: int) -> None:
        """Raise MemoryError if the machine has less free memory than that."""
        free = available_memory()
        if free is not None and nbytes > free:
            raise MemoryError(
                f"The store needs {nbytes} bytes of host memory but {free} are free; "
                "give store= a folder on a local disk."
            )
        self._blocks = PinnedBlocks(nbytes, self._device)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in host memory."""
        if self._device.type != "cuda":
            return torch.empty(tuple(shape), dtype=dtype)
        return self._blocks.allocate(shape, dtype)


class FolderStore:
    """Mapped files without a name: their space is reserved when they are made, and a killed run leaves none behind.

    Args:
        folder: an existing or new folder on a local disk.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def _full(self, nbytes: int) -> OSError:
        free = shutil.disk_usage(self._folder).free
        return OSError(
            errno.ENOSPC,
            f"The store needs {nbytes} bytes but the disk of {self._folder} has {free} left; "
            "free some, or choose another folder.",
        )

    def reserve(self, nbytes: int) -> None:
        """Raise OSError if the disk has less space than that."""
        if nbytes > shutil.disk_usage(self._folder).free:
            raise self._full(nbytes)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in a mapped file; its blocks exist before it is used, so a full disk cannot end in a bus error."""
        nbytes = dtype.itemsize
        for n in shape:
            nbytes *= n
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        with tempfile.TemporaryFile(prefix="halo_", dir=self._folder) as file:
            try:
                _reserve_blocks(file.fileno(), nbytes)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise self._full(nbytes) from None
                raise
            mapped = mmap.mmap(file.fileno(), nbytes)
        return torch.frombuffer(mapped, dtype=torch.uint8).view(dtype).view(tuple(shape))


def _reserve_blocks(handle: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, nbytes)
        return
    block = bytes(2**20)  # without the system call (macOS) the blocks are written
    for start in range(0, nbytes, len(block)):
        os.pwrite(handle, block[: min(len(block), nbytes - start)], start)


def available_memory() -> int | None:
    """Free bytes of host memory, a container's limit included; None where the system does not tell."""
    found = []
    try:
        with open("/proc/meminfo") as file:
            found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
    except OSError:
        return None
    for used, limit in (
        ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.max"),
        ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return max(min(found), 0) if found else None

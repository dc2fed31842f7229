"""Host memory that a GPU reads and writes directly, given out in whole tensors and used again."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch

PORTABLE = 1
"""For all GPUs; CUDA's name is cudaHostRegisterPortable."""


class PinnedBlocks:
    """Locked blocks of the exact size; one that no tensor uses any more is given to the next tensor of that size.

    torch's own pinned memory is rounded up to powers of two and never given back to the system. Where the system locks
    no memory it is used as it is, and copies are slower.

    Args:
        limit: bytes that may be held at once; blocks that nobody uses are given back before more is taken.
        device: the GPU.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self._limit, self._device, self._held = limit, device, 0
        self._unused: list[torch.Tensor] = []

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        block = self._block(nbytes)
        handle = block.numpy()[:]  # of this tensor and its views alone: it dies with the last of them
        weakref.finalize(handle, _give_back, weakref.ref(self), block).atexit = False
        return torch.from_numpy(handle).view(dtype).view(tuple(shape))

    def _block(self, nbytes: int) -> torch.Tensor:
        for at, block in enumerate(self._unused):
            if block.numel() == nbytes:
                return self._unused.pop(at)
        while self._unused and self._held + nbytes > self._limit:
            self._held -= self._unused.pop().numel()
        self._held += nbytes
        memory = _new_memory(nbytes)
        block = torch.frombuffer(memory, dtype=torch.uint8).zero_()
        if locked(block, self._device):  # unlocked while it is still there: what unlocks holds the memory
            unlock = weakref.finalize(block.untyped_storage(), _unlock, block.data_ptr(), self._device, memory)
            unlock.atexit = False
        return block


def _new_memory(nbytes: int) -> mmap.mmap:
    """Memory in large pages; whoever takes it writes it first: to lock pages that do not exist yet takes far longer."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, nbytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(blocks: weakref.ref[PinnedBlocks], block: torch.Tensor) -> None:
    """To those who gave it out, if they are there; results may outlive them."""
    owner = blocks()
    if owner is not None:
        owner._unused.append(block)


def locked(block: torch.Tensor, device: torch.device) -> bool:
    """Lock the memory of a tensor; whether the system does it."""
    with torch.cuda.device(device):
        if int(_runtime().cudaHostRegister(block.data_ptr(), block.numel() * block.element_size(), PORTABLE)) == 0:
            return True
        with contextlib.suppress(RuntimeError):  # the error stays until somebody looks
            torch.zeros(1, device=device)
    return False


def _unlock(address: int, device: torch.device, _: mmap.mmap) -> None:
    torch.cuda.synchronize(device)  # copies may be on their way
    with torch.cuda.device(device):
        _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()

"""Logits in a scratch file: written by rows, read by classes, and passed on as the tensor or array that callers expect.

They lie there as in memory, class after class, so the tensor is contiguous, as nnU-Net's of an image without padding.

A process that gets them from another one gets the open file, not the values.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nnunet_plugins.lean.predict.files import ScratchFile

Place: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


class LogitsFile:
    """Half-precision logits (C, X, Y, Z) on disk, class after class.

    Args:
        shape: (C, X, Y, Z).
        file: An existing one; None reserves the space.
    """

    def __init__(self, shape: Sequence[int], file: ScratchFile | None = None) -> None:
        self.shape = tuple(int(extent) for extent in shape)
        self.file = file or ScratchFile(2 * math.prod(self.shape))
        self.plane = self.shape[2] * self.shape[3]

    def _offset(self, row: int, label: int) -> int:
        return 2 * (label * self.shape[1] + row) * self.plane

    def write(self, row: int, first_class: int, planes: Tensor) -> None:
        """Write planes (classes, Y, Z) of one row."""
        for label, plane in enumerate(planes.numpy(), first_class):
            self.file.write(self._offset(row, label), plane)

    def read(self, row: int, first_class: int, classes: int) -> Tensor:
        """Planes (classes, Y, Z) of one row."""
        out = np.empty((classes, *self.shape[2:]), np.float16)
        for label, plane in enumerate(out, first_class):
            self.file.read(self._offset(row, label), plane)
        return torch.from_numpy(out)

    def class_volumes(self, first: int, stop: int) -> np.ndarray:
        """Logits (stop - first, X, Y, Z) of some classes."""
        return self.file.read(self._offset(0, first), np.empty((stop - first, *self.shape[1:]), np.float16))

    def mapped(self) -> Tensor:
        """The logits as a tensor on the file: only what is looked at comes into memory."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=torch.half)
        return torch.frombuffer(self.file.map(), dtype=torch.half).view(self.shape)

    def tensor(self) -> StoredLogits:
        """What nnU-Net's predictor returns: a CPU tensor (C, X, Y, Z)."""
        stored = torch.Tensor._make_subclass(StoredLogits, self.mapped())
        stored.file = self
        stored.place = place_of(stored)
        return stored


class StoredLogits(torch.Tensor):
    """A CPU tensor on a :class:`LogitsFile`; whatever is computed from it is an ordinary tensor."""

    file: LogitsFile
    place: Place

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def cpu(self, *args: Any, **kwargs: Any) -> StoredLogits:
        """Itself."""
        return self

    def detach(self) -> StoredLogits:
        """Itself: logits have no gradient."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Itself on the CPU, as for every tensor that is there already."""
        if args in (("cpu",), (torch.device("cpu"),)) and not kwargs:
            return self
        return self.as_subclass(Tensor).to(*args, **kwargs)

    def numpy(self, *args: Any, **kwargs: Any) -> StoredArray:
        """The same file as an array."""
        array = self.as_subclass(Tensor).numpy().view(StoredArray)
        array.file, array.place = file_of(self), place_of(array)
        return array

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).contiguous().__reduce_ex__(protocol)


class StoredArray(np.ndarray):
    """An array on a :class:`LogitsFile`; views of it and results are ordinary as far as this package is concerned."""

    file: LogitsFile | None = None
    place: Place | None = None


def place_of(logits: Any) -> Place:
    """Where the values of a tensor or array lie in memory: address, shape and strides."""
    if isinstance(logits, Tensor):
        return logits.data_ptr(), tuple(logits.shape), logits.stride()
    return logits.ctypes.data, logits.shape, logits.strides


def file_of(logits: Any) -> LogitsFile | None:
    """The file on which a whole tensor or array lies, None for ordinary ones.

    One that was transposed, cut or given other values in place is an ordinary one.
    """
    file = getattr(logits, "file", None) if isinstance(logits, (StoredLogits, StoredArray)) else None
    return file if file is not None and place_of(logits) == logits.place else None


def class_volumes(logits: Tensor | np.ndarray, first: int, stop: int) -> np.ndarray:
    """Some classes (stop - first, X, Y, Z) of logits of any kind, as an array."""
    file = file_of(logits)
    if file is not None:
        return file.class_volumes(first, stop)
    part = logits[first:stop]
    return part.numpy() if isinstance(part, Tensor) else np.asarray(part)


def release(mapping: mmap.mmap) -> None:
    """Let go of a mapping's pages: they stay in the file, and no longer count as memory of this process."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _send_tensor(logits: StoredLogits) -> Any:
    file = file_of(logits)
    if file is None:
        return torch.from_numpy, (logits.clone().numpy(),)
    return _receive_tensor, (file.shape, DupFd(file.file.descriptor))


def _send_array(logits: StoredArray) -> Any:
    file = file_of(logits)
    if file is None:
        return np.asarray(logits).__reduce_ex__(2)
    return _receive_array, (file.shape, DupFd(file.file.descriptor))


def _receive_tensor(shape: tuple[int, ...], sent: Any) -> StoredLogits:
    return LogitsFile(shape, ScratchFile(2 * math.prod(shape), sent.detach())).tensor()


def _receive_array(shape: tuple[int, ...], sent: Any) -> StoredArray:
    return _receive_tensor(shape, sent).numpy()


ForkingPickler.register(StoredLogits, _send_tensor)
ForkingPickler.register(StoredArray, _send_array)

"""Keeps only the running virtual rank's tensors on the device; the others wait in host memory or in mapped files."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 16384  # storages up to this size stay where they are: statistics, scalars
PINNED = 2**20  # bytes up to which torch may round a pinned buffer up to the next power of two


class HostStore:
    """Waiting room in host memory, pinned if the device is a GPU (torch keeps pinned buffers for the next use).

    Args:
        device: where the tensors come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._pin = device.type == "cuda"

    def write(self, data: torch.Tensor) -> list[torch.Tensor]:
        """Copy bytes in; returns the ticket."""
        parts = data.split(_without_rounding(data.numel()) if self._pin else [data.numel()])
        slot = [torch.empty(len(part), dtype=torch.uint8, pin_memory=self._pin) for part in parts]
        for buffer, part in zip(slot, parts, strict=True):
            buffer.copy_(part, non_blocking=self._pin)
        return slot

    def read(self, slot: list[torch.Tensor], data: torch.Tensor) -> None:
        """Copy bytes back."""
        for buffer, part in zip(slot, data.split([len(buffer) for buffer in slot]), strict=True):
            part.copy_(buffer, non_blocking=self._pin)

    def release(self, slot: list[torch.Tensor]) -> None:
        """Give a ticket back: nothing to do, the buffer goes with it."""

    def close(self) -> None:
        """Nothing is left."""


def _without_rounding(nbytes: int) -> list[int]:
    """Sizes of pinned buffers that hold so many bytes: powers of two, to which torch rounds all of them, and a rest."""
    sizes = []
    while nbytes > PINNED:
        sizes.append(1 << (nbytes.bit_length() - 1))
        nbytes -= sizes[-1]
    return [*sizes, nbytes] if nbytes else sizes


class FolderStore:
    """Waiting room in files of a folder, mapped only while they are copied.

    Args:
        folder: an existing or new folder on a local disk.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix="halo_", dir=folder)
        self._free: dict[int, list[tuple[str, int]]] = {}
        self._count = 0

    def write(self, data: torch.Tensor) -> tuple[str, int]:
        """Copy bytes in; returns the ticket."""
        free = self._free.get(data.numel())
        if free:
            slot = free.pop()
        else:
            self._count += 1
            slot = (str(Path(self._folder.name) / f"{self._count}.bin"), data.numel())
        _mapped(*slot).copy_(data)
        return slot

    def read(self, slot: tuple[str, int], data: torch.Tensor) -> None:
        """Copy bytes back."""
        data.copy_(_mapped(*slot))

    def release(self, slot: tuple[str, int]) -> None:
        """Give a ticket back."""
        self._free.setdefault(slot[1], []).append(slot)

    def output(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in a file that disappears with the tensor."""
        shape = list(shape)
        count = torch.Size(shape).numel()
        descriptor, path = tempfile.mkstemp(dir=self._folder.name)
        os.close(descriptor)
        tensor = torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
        os.unlink(path)
        return tensor

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


def _mapped(path: str, size: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


class _Entry:
    """One storage: where its bytes are."""

    def __init__(self, reference: Any, nbytes: int) -> None:
        self.reference, self.nbytes = reference, nbytes
        self.resident, self.slot = True, None  # type: bool, Any


class Pager:
    """Counts the bytes on the device and moves storages in and out.

    Args:
        store: where evicted storages wait, None to count only.
        device: where the network runs.
        resident: tensors that stay (weights, the caller's volume) and are not counted.

    Attributes:
        live: bytes on the device now.
        peak: highest number of bytes on the device.
        moved: bytes copied in either direction.
    """

    def __init__(self, store: HostStore | FolderStore | None, device: torch.device, resident: Iterable[Any]) -> None:
        self.store, self.device = store, device
        self.live = self.peak = self.moved = 0
        self.busy = False
        self._entries: dict[int, _Entry] = {}
        self._skip = {t.untyped_storage()._cdata for t in resident}

    def see(self, tensor: torch.Tensor) -> None:
        """Make a tensor's bytes present, or enter it on first sight."""
        storage = tensor.untyped_storage()
        entry = self._entries.get(storage._cdata)
        if entry is None:
            self._enter(storage)
        elif not entry.resident:
            self._fetch(entry, storage)

    def ignore(self, tensor: torch.Tensor) -> torch.Tensor:
        """Never count or move this tensor (the whole output, which lives in the store)."""
        self._skip.add(tensor.untyped_storage()._cdata)
        return tensor

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._skip or storage.device.type != self.device.type or not storage.resizable() or nbytes == 0:
            return
        self._entries[key] = _Entry(weakref.ref(storage, partial(self._gone, key)), nbytes)
        self._move(nbytes)

    def _gone(self, key: int, _reference: Any) -> None:
        entry = self._entries.pop(key)
        if entry.resident:
            self.live -= entry.nbytes
        self._release(entry)

    def _release(self, entry: _Entry) -> None:
        if entry.slot is not None and self.store is not None:
            self.store.release(entry.slot)
            entry.slot = None

    def _move(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def _bytes_of(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def _fetch(self, entry: _Entry, storage: torch.UntypedStorage) -> None:
        assert self.store is not None
        with self.quietly():
            storage.resize_(entry.nbytes)
            self.store.read(entry.slot, self._bytes_of(storage))
        entry.resident = True
        self.moved += entry.nbytes
        self._move(entry.nbytes)

    def changed(self, tensor: torch.Tensor) -> None:
        """The tensor was written to: its copy in the store is stale."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            self._release(entry)

    def evict(self, _rank: int = 0) -> None:
        """Move everything out that is not small; what is in the store unchanged is not copied again."""
        if self.store is None:
            return
        with self.quietly():
            for entry in self._entries.values():
                storage = entry.reference()
                if storage is not None and entry.resident and entry.nbytes > SMALL:
                    self._evict(entry, storage)

    def _evict(self, entry: _Entry, storage: torch.UntypedStorage) -> None:
        assert self.store is not None
        if entry.slot is None:
            entry.slot = self.store.write(self._bytes_of(storage))
            self.moved += entry.nbytes
        storage.resize_(0)
        entry.resident = False
        self.live -= entry.nbytes

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """The pager's own copies are not watched."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Arguments an operation writes to."""
    arguments = func._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


class Watch(TorchDispatchMode):
    """Tells a pager about every operation of this thread.

    Args:
        pager: shared by all virtual ranks.
    """

    def __init__(self, pager: Pager) -> None:
        super().__init__()
        self._pager = pager

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pager = self._pager
        if pager.busy:
            return func(*args, **kwargs)
        for t in _tensors((args, list(kwargs.values()))):
            pager.see(t)
        out = func(*args, **kwargs)
        for i, name in _written(func):
            for t in _tensors(args[i] if i < len(args) else kwargs.get(name)):
                pager.changed(t)
        for t in _tensors(out):
            pager.see(t)
        return out

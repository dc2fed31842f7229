"""The CPU's account of live storages: what every operation makes, and when each of it is freed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._python_dispatch import TorchDispatchMode

from monai_memeff.memory.threads import short_lock


class _StorageReference(weakref.ref):
    """A weak reference to a storage that remembers its address and the bytes counted for it."""

    __slots__ = ("address", "counts", "nbytes")
    address: int
    counts: bool
    nbytes: int


class StorageTracker:
    """Which storages are alive, how many bytes above entry that makes, and how high it has been."""

    def __init__(self, kind: str = "cpu", count_older: bool = True) -> None:
        self.peak = 0
        self._kind = kind  # "cpu", or "meta" for a dry run
        self._count_older = count_older  # whether storages from before lower the level when they go
        self._live = 0
        self._entries: dict[int, _StorageReference] = {}
        self._survivors: dict[int, StorageWeakRef] = {}
        self._lock = threading.RLock()

    @property
    def live(self) -> int:
        """Bytes alive now, above the level at entry."""
        self._sync()
        return self._live

    def note_older(self, tensors: Iterable[Tensor]) -> None:
        """Enter tensors that are alive already: they raise nothing, and lower the level when they go."""
        for tensor in tensors:
            for storage in _storages(tensor):
                self.track(storage, is_new=False)

    def track(self, storage: torch.UntypedStorage, is_new: bool) -> None:
        """Enter a storage on first sight; follow its size afterwards."""
        entry = self._entries.get(storage._cdata)
        if entry is not None:
            if entry.counts and storage.nbytes() != entry.nbytes and storage.resizable():
                self.follow(storage)
            return
        entry = _StorageReference(storage, self._forget)
        entry.address = storage._cdata
        # Storages of foreign memory (numpy, mapped files) cannot be resized: they are known, and count nothing.
        counts = storage.device.type == self._kind and (is_new or self._count_older)
        entry.counts, entry.nbytes = counts, storage.nbytes() if counts and storage.resizable() else 0
        self._entries[entry.address] = entry
        if is_new:
            self._move(entry.nbytes)

    def follow(self, storage: torch.UntypedStorage) -> None:
        """Correct the count of a storage whose size has changed."""
        entry = self._entries.get(storage._cdata)
        if entry is not None and entry.counts:
            change, entry.nbytes = storage.nbytes() - entry.nbytes, storage.nbytes()
            self._move(change)

    def close(self) -> None:
        """Let go of all references; the numbers stay."""
        self._sync()
        self._entries.clear()
        self._survivors.clear()

    def _forget(self, entry: _StorageReference) -> None:
        """The Python object is going. As a rule the storage goes with it: nobody else owns it."""
        if entry.address not in self._entries:
            return
        if torch._C._storage_Use_Count(entry.address) > 1:
            self._survivors[entry.address] = _reference_from_outside(entry.address)
        else:
            self._remove(entry.address)

    def _sync(self) -> None:
        """Strike out the survivors that have gone since; no callback tells of them."""
        for address, reference in list(self._survivors.items()):
            if reference.expired():
                self._remove(address)
                self._survivors.pop(address, None)

    def _remove(self, address: int) -> None:
        entry = self._entries.pop(address, None)
        if entry is not None:
            self._move(-entry.nbytes)

    def _move(self, change: int) -> None:
        if change > 0 and self._survivors:
            self._sync()
        with self._lock:
            self._live += change
            self.peak = max(self.peak, self._live)


def _reference_from_outside(address: int) -> StorageWeakRef:
    """A weak reference to the storage itself instead of its Python object.

    In older torch (2.6 does it, 2.15 does not) the garbage collector ends the weak references to the Python object of
    a storage that hangs in a circle of garbage, although a tensor or the autograd graph keeps storage and object alive.
    """
    return StorageWeakRef(torch.UntypedStorage._new_with_weak_ptr(address))


_BORN_UNSEEN = (torch.ops.aten.lift_fresh, torch.ops.aten.lift, torch.ops.aten.set_)
"""Operations that receive storages which no operation has made: `torch.tensor`, `copy.deepcopy`, `torch.load`."""


class Watcher(TorchDispatchMode):
    """Shows every operation's tensors to a tracker, in the forward and in the backward pass."""

    supports_higher_order_operators = True  # they are counted from outside, like any other operation

    def __init__(self, tracker: StorageTracker) -> None:
        super().__init__()
        self._track = tracker.track

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Enter the arguments, run the operation, enter its results."""
        kwargs = kwargs or {}
        self._show(args, getattr(func, "overloadpacket", None) in _BORN_UNSEEN)
        if kwargs:
            self._show(kwargs.values(), False)
        result = func(*args, **kwargs)
        if _mutates(func):  # an argument may have been resized, or moved to another storage
            self._show(args, True)
            self._show(kwargs.values(), True)
        self._show((result,), True)
        return result

    def _show(self, values: Iterable[Any], is_new: bool) -> None:
        for value in values:
            if isinstance(value, Tensor):
                for storage in _storages(value):
                    self._track(storage, is_new)
            elif isinstance(value, (list, tuple)):
                self._show(value, is_new)
            elif isinstance(value, torch.UntypedStorage):
                self._track(value, is_new)


@cache
def _mutates(func: Hashable) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and schema.is_mutable


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor: one if it is dense, several if it is sparse or wraps other tensors."""
    if tensor.layout == torch.strided and not _is_wrapper(tensor):
        yield tensor.untyped_storage()
        return
    for part in _parts(tensor):
        yield from _storages(part)


def _is_wrapper(tensor: Tensor) -> bool:
    kind = type(tensor)
    return kind is not Tensor and kind is not Parameter and hasattr(kind, "__tensor_flatten__")


def _parts(tensor: Tensor) -> list[Tensor]:
    if _is_wrapper(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []  # an opaque layout has no storage to count


def tensors_alive() -> list[Tensor]:
    """Every tensor that Python's garbage collector knows, and the gradients of the leaves."""
    objects = gc.get_objects()
    kinds = _subclasses(Tensor) - _subclasses(UninitializedTensorMixin)  # lazy ones have no storage yet
    tensors = list(compress(objects, map(kinds.__contains__, map(type, objects))))
    del objects  # in Python 3.10 it holds the frame of this call: a circle that would keep every object alive
    with torch._C.DisableTorchFunctionSubclass():
        tensors = list(filter(_is_one, tensors))
        gradients = [tensor.grad for tensor in tensors if tensor.is_leaf]
    return tensors + [gradient for gradient in gradients if gradient is not None]


def _is_one(tensor: Tensor) -> bool:
    """False of the empty shells that torch.jit of torch 2.8 leaves."""
    try:
        tensor.is_leaf  # noqa: B018
    except RuntimeError:
        return False
    return True


def _subclasses(kind: type) -> set[type]:
    below: list[type] = type.__subclasses__(kind)
    return {kind}.union(*map(_subclasses, below))


_resizing: list[StorageTracker] = []
_plain: list[Any] = []  # what the class had before, if it had one of its own
_changing = short_lock()


def watch_resize(tracker: StorageTracker) -> Callable[[], None]:
    """Follow `UntypedStorage.resize_`, which no dispatch mode sees; returns what ends it, in any order of threads."""
    with _changing:
        if not _resizing:
            _follow_all()
        _resizing.append(tracker)

    def end() -> None:
        with _changing:
            _resizing.remove(tracker)
            if not _resizing:
                _follow_none()

    return end


def _follow_all() -> None:
    before, original = vars(torch.UntypedStorage).get("resize_"), torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, nbytes: int) -> Any:
        result = original(storage, nbytes)
        for tracker in list(_resizing):
            tracker.follow(storage)
        return result

    _plain[:] = [before] if before is not None else []
    torch.UntypedStorage.resize_ = resize_


def _follow_none() -> None:
    if _plain:
        torch.UntypedStorage.resize_ = _plain.pop()
    else:
        del torch.UntypedStorage.resize_

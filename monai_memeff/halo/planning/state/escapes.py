"""Tensors of a capture that code keeps outside of the network's modules: in caches, closures, lists of a hook."""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor  # read in torch 2.6 to 2.14
from torch.overrides import TorchFunctionMode

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.memory.dry.known_numbers import tensors_in

_NOT_THE_USERS = ("/torch/", "/monai_memeff/halo/", "/monai_memeff/memory/", "<")
_DEPTH = 4  # containers in containers


class Escapes(TorchFunctionMode):
    """Remembers, without keeping them, the tensors that functions return, and which are made from no other tensor.

    A captured tensor has no content. Code that keeps one would use it in a later plain call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[weakref.ref[torch.Tensor], bool, str]] = []
        self._constant: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        constant = all(id(x) in self._constant for x in tensors_in((args, kwargs)))
        given = {id(x) for x in tensors_in((args, kwargs))}
        for x in filter(_captured, tensors_in(result)):
            if id(x) in given:  # written in place
                continue
            (self._constant.add if constant else self._constant.discard)(id(x))
            self._made.append((weakref.ref(x), constant, _line()))
        return result

    def _alive(self) -> list[tuple[torch.Tensor, bool, str]]:
        found = [(ref(), constant, line) for ref, constant, line in self._made]
        return [(x, constant, line) for x, constant, line in found if x is not None]

    def recall(self) -> None:
        """Take back what was kept: a cache of constants is emptied.

        Raises:
            NotPartitionableError: if something else was kept, which a plain call would have left there.
        """
        if not self._alive():
            return
        gc.collect()
        left = self._take_back() or [line for _, _, line in self._alive()]
        if left:
            raise NotPartitionableError(
                f"{left[0]}: forward, or a hook, keeps a tensor outside of the network's modules; a run in parts could "
                "not leave it there. Return it instead, or keep it in an attribute of a module"
            )

    def _take_back(self) -> list[str]:
        """The lines that made what was kept and is not a constant."""
        found = self._alive()
        for x, _, _ in found:
            _forget(x, {id(found), *map(id, found)})
        return list(dict.fromkeys(line for _, constant, line in found if not constant))


def _captured(x: torch.Tensor) -> bool:
    return isinstance(x, FakeTensor)


def _line() -> str:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and any(part in frame.f_code.co_filename for part in _NOT_THE_USERS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "the network"


def _forget(thing: Any, ours: set[int], depth: int = 0) -> None:
    """Remove an object from whatever holds it; nothing here may close over it, as the closure would hold it too."""
    holders = gc.get_referrers(thing)
    ours = ours | {id(holders)}
    for holder in holders:
        if id(holder) in ours or isinstance(holder, types.FrameType):
            continue
        if isinstance(holder, (tuple, frozenset)):
            if depth < _DEPTH:
                _forget(holder, ours, depth + 1)
        else:
            _remove(holder, thing)


def _remove(holder: Any, thing: Any) -> None:
    if isinstance(holder, dict):
        attributes = any(getattr(x, "__dict__", None) is holder for x in gc.get_referrers(holder))
        for key in [k for k, v in holder.items() if v is thing]:
            if attributes:
                holder[key] = None
            else:
                del holder[key]
    elif isinstance(holder, list):
        holder[:] = [v for v in holder if v is not thing]
    elif isinstance(holder, types.CellType):
        holder.cell_contents = None
    elif isinstance(holder, functools._lru_cache_wrapper):
        holder.cache_clear()
    else:
        for name in [k for k, v in getattr(holder, "__dict__", {}).items() if v is thing]:
            object.__setattr__(holder, name, None)

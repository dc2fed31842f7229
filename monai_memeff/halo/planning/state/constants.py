"""Small tensors that a module keeps as plain attributes: forward may branch on them, as their content is known."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils import _python_dispatch  # read in torch 2.6 to 2.14

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.reasons import place_of_frame
from monai_memeff.halo.planning.state.overlap import check_overlap
from monai_memeff.memory.dry.known_numbers import FEW, KnownNumbers, tensors_in

_READING = frozenset(  # none of them writes
    (
        *("__getitem__", "__get__", "__iter__", "__bool__", "__int__", "__float__", "__index__", "__len__"),
        *("__contains__", "unbind", "item", "tolist", "numpy", "eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__"),
        *("__lt__", "__le__", "__gt__", "__ge__", "any", "all", "sum", "argmax", "argmin", "amax", "amin", "max"),
        *("min", "numel", "size", "dim", "nonzero", "detach", "long", "int", "float", "double", "bool", "cpu", "equal"),
    )
)


_SIZED_BY_DATA = "has a result whose size depends on the data; multiply by a mask instead of choosing"
_GET_DATA, _SET_DATA = torch.Tensor.data.__get__, torch.Tensor.data.__set__
_WRITING = frozenset(
    (
        "__setitem__",
        "__set__",
        *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
    )
)
_VIEWING = frozenset(
    ("__getitem__", "__get__", "view", "reshape", "select", "narrow", "flatten", "detach", "transpose")
)


def is_constant(x: Any) -> bool:
    """Whether a plain attribute is a tensor small enough to be compared in full at every call."""
    return (
        isinstance(x, torch.Tensor)
        and not isinstance(x, nn.Parameter)
        and type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not x.requires_grad
        and x.numel() <= FEW
    )


class Constants(KnownNumbers):
    """Reads such tensors, and those made from numbers, while a network is captured; nothing is written to the former.

    Args:
        network: whose modules' attributes are meant, those in lists, tuples and dictionaries among them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sized_by_data: str | None = None  # the first result whose size depends on the data, in words
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}
        self._held: dict[int, weakref.ref[torch.Tensor]] = {}
        for module in network.modules():
            for name, value in module.__dict__.items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    self._add(value)

    def _add(self, value: Any) -> None:
        for x in tensors_in(value):
            self._held[id(x)] = weakref.ref(x)
            if is_constant(x):
                self._known[id(x)] = self._held[id(x)]

    def _knows(self, x: torch.Tensor) -> bool:
        found = self._known.get(id(x))
        return found is not None and found() is x

    def content(self, x: torch.Tensor) -> torch.Tensor | None:
        """The content of a tensor, None if it is not known."""
        return x if self._knows(x) else super().content(x)

    def _holds(self, x: torch.Tensor) -> bool:
        found = self._held.get(id(x))
        return found is not None and found() is x

    def _note_size(self, name: str, result: Any) -> None:
        if self.sized_by_data is None and any(map(_is_sized_by_data, tensors_in(result))):
            self.sized_by_data = f"{place_of_frame(sys._getframe(), self.network)}: {name} {_SIZED_BY_DATA}"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result, from the content where it only reads constants."""
        kwargs = kwargs or {}
        if func == _GET_DATA and not self._knows(args[0]):
            return args[0].detach()  # torch.export takes `data` for a constant, and dies where it is written to
        if func == _SET_DATA:
            raise NotPartitionableError("forward assigns to a tensor's `data`: write into the tensor with copy_")
        name, read = getattr(func, "__name__", ""), list(tensors_in((args, kwargs)))
        if "assert_async" in name:  # torch.export drops the one without a message
            raise NotPartitionableError(
                "torch._assert_async checks values, which a run in parts would not: leave it out"
            )
        if _writes(name, kwargs) and name != "__set__":
            check_overlap(name, args, kwargs.get("out"))
        if name not in _READING or not read or not all(map(self._knows, read)):
            if any(map(self._holds, read[:1])) and _writes(name, kwargs):
                raise NotPartitionableError(
                    f"forward writes into a tensor of shape {tuple(read[0].shape)} that a module keeps as a plain "
                    "attribute: register it as a buffer"
                )
            result = super().__torch_function__(func, types, args, kwargs)
            self._note_size(name, result)
            if name in _VIEWING and any(map(self._holds, read[:1])):
                self._held.update((id(x), weakref.ref(x)) for x in tensors_in(result))
            return result
        with _python_dispatch._disable_current_modes():
            result = func(*args, **kwargs)
            result = list(result) if hasattr(result, "__next__") else result
            self._add(result)
        return iter(result) if name == "__iter__" else result


def _is_sized_by_data(x: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return not all(isinstance(n, int) for n in x.shape)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function of that name writes into its first tensor."""
    return name in _WRITING or (name.endswith("_") and not name.startswith("__")) or kwargs.get("out") is not None

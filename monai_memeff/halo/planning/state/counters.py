"""Numbers and texts that forward itself changes in its modules: a network whose work depends on them is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from monai_memeff.halo.planning.errors import NotPartitionableError

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_OWN = ("_parameters", "_buffers", "_modules", "_forward_hooks")
_OTHER = "something else"


class Counters:
    """Sees what one call of a network leaves in its modules; `torch.export` and a capture put all of it back.

    Args:
        network: about to be captured.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.before = network, dict[str, Any]()
        self.left: dict[tuple[nn.Module, str], Any] | None = None

    def __enter__(self) -> Counters:
        self._thread = threading.get_ident()
        self._hook = self.network.register_forward_hook(self._see)
        self.before = {f"{path}.{name}".lstrip("."): _frozen(v) for path, _, name, v in _held(self.network)}
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _see(self, *_: Any) -> None:
        if self.left is not None or threading.get_ident() != self._thread:
            return
        self.left, self.names = {}, list[str]()
        for path, module, name, value in _held(self.network):
            frozen, full = _frozen(value), f"{path}.{name}".lstrip(".")
            if frozen != self.before.get(full):
                self.names.append(full)
                self.left[module, name] = None if _other(frozen) else copy.deepcopy(value)
                if _other(frozen):  # constants that are made once
                    self.left.clear()
                    return

    def check(self, exported: Any, args: Any, kwargs: Any) -> None:
        """Capture from where the first call ended, if it left numbers behind, and compare.

        Args:
            exported: the first capture.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Raises:
            NotPartitionableError: if the second call of the network would compute something else than the first.
        """
        if not self.left:
            return
        for (module, name), value in self.left.items():
            module.__dict__[name] = value
        again = torch.export.export(self.network, args, kwargs, strict=False)
        if _work(again) != _work(exported):
            raise NotPartitionableError(
                f"forward changes the attribute '{self.names[0]}' and computes something else at its next call: a run "
                "in parts puts a network back as it was; pass what changes as an argument"
            )


def _held(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    for path, module in network.named_modules():
        for name, value in list(module.__dict__.items()):
            if name not in _OWN:
                yield path, module, name, value


def _frozen(value: Any) -> Any:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, torch.Tensor):
        return (_OTHER, id(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return ("dict", *((_frozen(k), _frozen(v)) for k, v in value.items()))
    return (_OTHER, id(value))


def _other(frozen: Any) -> bool:
    """Whether there is more in it than numbers, texts and containers of them."""
    return isinstance(frozen, tuple) and (frozen[:1] == (_OTHER,) or any(map(_other, frozen)))


def _work(exported: Any) -> Any:
    """The code of a captured network, and the constants in it."""
    constants = {k: v.tolist() if isinstance(v, torch.Tensor) else None for k, v in exported.constants.items()}
    return exported.graph_module.code, repr(constants)

"""What a plan depends on besides the input's shape: it is made again when any of it has changed."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)
_DEPTH = 4


def _key(value: Any, depth: int = 0) -> Hashable:
    if isinstance(value, torch.Tensor):
        registered = isinstance(value, nn.Parameter)
        return (id(value), tuple(value.shape), value.dtype, value.device, None if registered else value._version)
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value)
    if depth < _DEPTH and isinstance(value, (list, tuple)):
        return tuple(_key(v, depth + 1) for v in value)
    if depth < _DEPTH and isinstance(value, dict):
        return tuple((_key(k, depth + 1), _key(v, depth + 1)) for k, v in value.items())
    if depth < _DEPTH and isinstance(value, (set, frozenset)):
        return frozenset(_key(v, depth + 1) for v in value)
    return id(value)


def _module_key(module: nn.Module) -> Hashable:
    found: list[Any] = [id(module), type(module)]
    for name, value in module.__dict__.items():
        if name == "_buffers":  # running statistics change their content, which the plan does not hold
            found.append(tuple((k, None if t is None else _key(t)[:4]) for k, t in value.items()))  # type: ignore[index]
        elif name != "_modules":
            found.append((name, _key(value)))
    return tuple(found)


def fingerprint(network: nn.Module) -> Hashable:
    """Equal for two calls only if every module has the same type, mode, attributes, hooks and tensors."""
    return tuple(_module_key(m) for m in network.modules())


def call_key(flat: list[Any]) -> Hashable:
    """The shapes and types of a call's tensors, and its other arguments."""
    return tuple(
        ("tensor", tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else _key(leaf) for leaf in flat
    )


def mode_key() -> Hashable:
    """Autocast and other modes that change what is captured."""
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)

"""Code that compares the type of a tensor: it finds another one in a capture than in a plain call."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.state.fingerprint import _names, _of_library

_TENSORS = ("Tensor", "Parameter")


def refuse_compared_types(network: nn.Module) -> None:
    """Refuse a network whose own code compares the type of a tensor.

    Raises:
        NotPartitionableError: with module, function and line.
    """
    seen: set[types.CodeType] = set()
    for path, module in network.named_modules():
        for function in _functions(module):
            for name, line in _comparisons(function, seen):
                raise NotPartitionableError(
                    f"{path or type(module).__name__}: {name} ({line}) compares the type of a tensor, which is another "
                    "one while a network is captured; write isinstance(x, torch.Tensor)"
                )


def _functions(module: nn.Module) -> Iterator[types.FunctionType]:
    """Functions of a module's own classes and of itself, its hooks among them."""
    values = [value for kind in type(module).__mro__ if not _of_library(kind) for value in vars(kind).values()]
    hooks = (module._forward_pre_hooks, module._forward_hooks)
    values += [*vars(module).values(), *(hook for found in hooks for hook in found.values())]
    for value in values:
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, (types.MethodType, staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, types.FunctionType):
            yield from (f for f in (value, inspect.unwrap(value)) if isinstance(f, types.FunctionType))


def _comparisons(function: types.FunctionType, seen: set[types.CodeType]) -> Iterator[tuple[str, str]]:
    """Name and line of functions that compare, of this one and of those that it names."""
    stack = [function]
    while stack:
        one = stack.pop()
        if one.__code__ in seen or _of_library(one):
            continue
        seen.add(one.__code__)
        line = _line(one.__code__)
        if line is not None:
            yield one.__qualname__, f"{one.__code__.co_filename}:{line}"
        named = (one.__globals__.get(name) for name in _names(one.__code__))
        stack += [value for value in named if isinstance(value, types.FunctionType)]


@functools.lru_cache(maxsize=4096)
def _line(code: types.CodeType) -> int | None:
    """The line of the first comparison, None where there is none or the source is not known."""
    if not {"type", "__class__"} & set(_names(code)):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Compare) and _compares(node)]
    return code.co_firstlineno + min(found) - 1 if found else None


def _compares(node: ast.Compare) -> bool:
    """type(x) is torch.Tensor, x.__class__ == Tensor, type(x) in (Tensor, Parameter), type(x).__name__ == "Tensor"."""
    sides = [node.left, *node.comparators]
    return any(map(_type_of, sides)) and any(_mentions(side, _TENSORS) for side in sides)


def _type_of(side: ast.expr) -> bool:
    named = isinstance(side, ast.Attribute) and side.attr in ("__name__", "__qualname__")
    side = side.value if named else side  # type: ignore[attr-defined]
    called = isinstance(side, ast.Call) and isinstance(side.func, ast.Name) and side.func.id == "type"
    return called or (isinstance(side, ast.Attribute) and side.attr == "__class__")


def _mentions(side: ast.expr, names: tuple[str, ...]) -> bool:
    values: list[Any] = [
        getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "value", None) for n in ast.walk(side)
    ]
    return any(isinstance(value, str) and value in names for value in values)

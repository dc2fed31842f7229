"""Code that compares the type of a tensor: it finds another one in a capture than in a plain call."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import torch
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
        line = _line(one.__code__, _other_names(one))
        if line is not None:
            yield one.__qualname__, f"{one.__code__.co_filename}:{line}"
        named = (one.__globals__.get(name) for name in _names(one.__code__))
        stack += [value for value in named if isinstance(value, types.FunctionType)]


def _other_names(function: types.FunctionType) -> frozenset[str]:
    """What a function calls tensors' types, or tables of them."""
    known = {name: function.__globals__.get(name) for name in _names(function.__code__)}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # not assigned yet
            known[name] = cell.cell_contents
    return frozenset(name for name, value in known.items() if _holds_tensors(value))


def _holds_tensors(value: Any) -> bool:
    inside = value if isinstance(value, (dict, list, tuple, set, frozenset)) else (value,)
    return any(kind is torch.Tensor or kind is nn.Parameter for kind in inside)


@functools.lru_cache(maxsize=4096)
def _line(code: types.CodeType, names: frozenset[str]) -> int | None:
    """The line of the first comparison, None where there is none or the source is not known."""
    if not {"type", "__class__"} & set(_names(code)):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    kept, names = _kept(tree), names - _filled(tree)
    found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.expr) and _compares(node, kept, names)]
    return code.co_firstlineno + min(found) - 1 if found else None


def _filled(tree: ast.AST) -> set[str]:
    """Tables that the code fills itself: caches (einops), which answer by other means for a type that they lack."""
    stores = (n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store))
    return {n.value.id for n in stores if isinstance(n.value, ast.Name)}


def _kept(tree: ast.AST) -> set[str]:
    """Variables that a type is kept in: kind = type(x), (kind := type(x)), kind, n = type(x), 3."""
    found: set[str] = set()
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=False))
            found |= {name.id for name, kind in pairs if isinstance(name, ast.Name) and _type_of(kind, found)}
    return found


def _compares(node: ast.expr, kept: set[str], names: frozenset[str]) -> bool:
    """type(x) is torch.Tensor, type(x).__name__ == "Tensor", type(x) in TYPES, TYPES[type(x)], TYPES.get(type(x))."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        left, right = sides, sides
    elif isinstance(node, ast.Subscript):
        left, right = [node.slice], [node.value]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        left, right = node.args, [node.func.value]
    else:
        return False
    return any(_type_of(one, kept) for one in left) and any(_mentions(one, {*_TENSORS, *names}) for one in right)


def _type_of(side: ast.AST | None, kept: set[str]) -> bool:
    while isinstance(side, ast.NamedExpr) or getattr(side, "attr", None) in ("__name__", "__qualname__"):
        side = side.value  # type: ignore[union-attr]
    called = isinstance(side, ast.Call) and isinstance(side.func, ast.Name) and side.func.id == "type"
    held = isinstance(side, ast.Name) and side.id in kept
    return called or held or (isinstance(side, ast.Attribute) and side.attr == "__class__")


def _mentions(side: ast.expr, names: set[str]) -> bool:
    values: list[Any] = [
        getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "value", None) for n in ast.walk(side)
    ]
    return any(isinstance(value, str) and value in names for value in values)

"""What a plan depends on besides the input's shape: it is made again when any of it has changed."""

from __future__ import annotations

import contextvars
import copyreg
import functools
import io
import logging
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from monai_memeff.halo.planning.state.constants import is_constant

_PLAIN = frozenset((int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size))
_LIBRARIES = frozenset(("torch", "monai", "numpy", *sys.stdlib_module_names)) - {"__main__"}  # nobody changes globals
_DESCRIPTORS = (
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType),
)
_STATELESS = (type(threading.Lock()), type(threading.RLock()))
_DRAWN_FROM = (random.random.__self__, np.random.rand.__self__)  # type: ignore[attr-defined]  # capture refuses draws
_MOST = 50_000  # objects looked at; a network that sees more of them is captured anew at every call


class _Same:
    """Equal to another only while both stand for one living object: a number may be given out again, this may not."""

    __slots__ = ("number", "ref")

    def __init__(self, value: Any) -> None:
        self.number, self.ref = id(value), weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        mine = self.ref()
        return isinstance(other, _Same) and mine is not None and mine is other.ref()

    def __hash__(self) -> int:
        return self.number


def _same(value: Any) -> Hashable:
    try:
        return _Same(value)
    except TypeError:  # no reference can be made to it
        return id(value)


class _NotComparableError(Exception):
    """A network holds on to more than can be compared, or to what does not tell its state."""


def _of_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function looks up, those of functions defined in it included."""
    inner = [n for const in code.co_consts if isinstance(const, types.CodeType) for n in _names(const)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


class _Reader:
    """Describes everything that a network's code can see, so that two descriptions are equal only if nothing changed.

    Tensors are described by identity and version, objects by their attributes, functions by their code and what they
    look up: defaults, closures and globals.
    """

    def __init__(self, skip: frozenset[str]) -> None:
        self.skip, self.seen = skip, dict[int, int]()
        self.kept = list[Any]()  # made here, and kept so that no number of theirs is given out again

    def key(self, value: Any) -> Hashable:
        """The description of any object."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if type(value) in _PLAIN:
            return (type(value).__name__, value)
        if id(value) in self.seen:
            return ("again", self.seen[id(value)])
        self.seen[id(value)] = len(self.seen)
        if len(self.seen) > _MOST:
            raise _NotComparableError
        for kinds, describe in self._KINDS:
            if isinstance(value, kinds):
                found = describe(self, value)
                held = getattr(value, "__dict__", None) if kinds in self._HOLDERS else None
                return (found, *self._attributes(value)) if held else found
        return self._object(value)

    def _tensor(self, value: torch.Tensor, version: bool = True) -> Hashable:
        if is_lazy(value):  # has no shape; a capture refuses it
            return _same(value)
        if version and is_constant(value):
            content = value.detach().resolve_conj().reshape(-1).contiguous().view(torch.uint8)
            return (_same(value), tuple(value.shape), value.dtype, content.numpy().tobytes())
        fixed = version and not isinstance(value, nn.Parameter)  # a plan does not hold the content of parameters
        return (_same(value), tuple(value.shape), value.dtype, value.device, value._version if fixed else None)

    def _sequence(self, value: Any) -> Hashable:
        return (type(value).__name__, *map(self.key, value))

    def _mapping(self, value: Mapping[Any, Any]) -> Hashable:
        return (type(value).__name__, *((self.key(k), self.key(v)) for k, v in list(value.items())))

    def _set(self, value: Any) -> Hashable:
        return frozenset(map(self.key, value))

    def _array(self, value: Any) -> Hashable:
        if value.dtype.hasobject:
            return (value.shape, self.key(value.tolist()))
        return (value.shape, value.dtype.str, hash(value.tobytes()))

    def _method(self, value: types.MethodType) -> Hashable:
        return (self.key(value.__func__), self.key(value.__self__))

    def _partial(self, value: Any) -> Hashable:
        return (self.key(value.func), self.key(value.args), self.key(value.keywords))

    def _wrapped(self, value: Any) -> Hashable:
        return (type(value).__name__, self.key(value.__func__))

    def _property(self, value: property) -> Hashable:
        return ("property", self.key(value.fget))

    def _function(self, value: types.FunctionType) -> Hashable:
        held = (value.__defaults__, value.__kwdefaults__, tuple(_contents(value)))
        found: list[Hashable] = [_same(value.__code__), *map(self.key, held)]
        if not _of_library(value):
            names = _names(value.__code__)
            found += [self._global(names, value.__globals__[name]) for name in names if name in value.__globals__]
        return tuple(found)

    def _global(self, names: tuple[str, ...], value: Any) -> Hashable:
        if not isinstance(value, types.ModuleType):
            return self.key(value)
        if value.__name__.partition(".")[0] in _LIBRARIES:
            return _same(value)
        inside = vars(value)
        return tuple(self.key(inside[n]) for n in names if n in inside and not isinstance(inside[n], types.ModuleType))

    def _class(self, value: type) -> Hashable:
        found: list[Hashable] = [_same(value)]
        for kind in value.__mro__:
            if kind is not value:
                found.append(self.key(kind))
            elif _of_library(kind):
                found += [_same(v) for v in vars(kind).values()]  # a method may be replaced
            else:
                found += [self.key(v) for k, v in list(vars(kind).items()) if k not in _BOOKKEEPING]
        return tuple(found)

    def _module(self, value: nn.Module) -> Hashable:
        found: list[Hashable] = [_same(value), self.key(type(value))]
        for name, held in list(value.__dict__.items()):
            if name in self.skip:
                continue
            if name == "_buffers":  # running statistics change their content, which the plan does not hold
                found.append(tuple((k, None if t is None else self._tensor(t, False)) for k, t in held.items()))
            else:
                found.append((name, self.key(held)))
        return tuple(found)

    def _object(self, value: Any) -> Hashable:
        kind: Any = type(value)
        if (kind.__module__ or "").partition(".")[0] == "torch" or isinstance(value, logging.Filterer):
            return _same(value)  # a log decides no value
        if any(value is x for x in _DRAWN_FROM):
            return _same(value)
        found: list[Hashable] = [_same(value), _same(kind) if _of_library(kind) else self.key(kind)]
        found += self._attributes(value)
        if _compiled(kind):
            found.append(self._inner(value))
        return tuple(found)

    def _attributes(self, value: Any) -> list[Hashable]:
        found: list[Hashable] = [(k, self.key(held)) for k, held in list(getattr(value, "__dict__", {}).items())]
        kind: Any = type(value)
        return found + [(name, self.key(getattr(value, name, None))) for name in _slots(kind)]

    def _inner(self, value: Any) -> Hashable:
        """What no attribute shows, by what pickle would write: the state of a random generator, of an iterator."""
        if isinstance(value, _STATELESS):
            return None
        if isinstance(value, (weakref.ref, contextvars.ContextVar)):
            return self.key(value() if isinstance(value, weakref.ref) else value.get(None))
        try:
            if isinstance(value, io.IOBase):
                return value.tell() if value.readable() and value.seekable() else None
            reduce = copyreg.dispatch_table.get(type(value))
            state = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:  # of anybody's code, of any kind
            raise _NotComparableError from error
        self.kept.append(state)
        return self.key(state)

    def _builtin(self, value: Any) -> Hashable:
        owner = getattr(value, "__self__", None)
        return (value.__name__, _same(owner) if isinstance(owner, types.ModuleType) else self.key(owner))

    _KINDS: tuple[tuple[Any, Any], ...] = (
        (nn.Module, _module),
        ((list, tuple, deque), _sequence),
        ((Mapping, types.MappingProxyType), _mapping),
        ((set, frozenset), _set),
        (np.ndarray, _array),
        (types.FunctionType, _function),
        (types.MethodType, _method),
        (functools.partial, _partial),
        ((staticmethod, classmethod), _wrapped),
        (property, _property),
        (type, _class),
        (types.BuiltinFunctionType, _builtin),
        ((types.ModuleType, types.CodeType, *_DESCRIPTORS), lambda self, value: _same(value)),
    )
    _HOLDERS = tuple(kinds for kinds, _ in _KINDS[1:7])  # containers and functions may have attributes


_BOOKKEEPING = frozenset(("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__qualname__"))


def _contents(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet filled
            yield None


@functools.lru_cache(maxsize=4096)
def _compiled(kind: type) -> bool:
    """Whether instances hold more than Python shows: they are larger than their attributes and slots explain."""
    for k in kind.__mro__[:-1]:
        base, own = k.__base__ or object, vars(k).get("__slots__", ())
        own = [own] if isinstance(own, str) else [n for n in own if n not in ("__dict__", "__weakref__")]
        offsets = [(k.__dictoffset__, base.__dictoffset__), (k.__weakrefoffset__, base.__weakrefoffset__)]
        words = len(own) + sum(new > 0 and not old for new, old in offsets)
        if k.__basicsize__ > base.__basicsize__ + words * object.__basicsize__ // 2 or k.__itemsize__:
            return True
    return False


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    found: list[str] = []
    for k in kind.__mro__:
        names = vars(k).get("__slots__", ())
        found += [names] if isinstance(names, str) else list(names)
    return tuple(n for n in found if n not in ("__dict__", "__weakref__"))


def fingerprint(network: nn.Module, skip: frozenset[str] = frozenset()) -> Hashable:
    """Equal for two calls only if nothing that the network's code can see has changed.

    That is every module's type, mode, attributes, hooks and tensors; objects and functions that they hold, with what
    those hold; classes; and the globals that functions look up. Contents of parameters and buffers are left out.

    Args:
        network: any nn.Module.
        skip: names of attributes of modules that do not count.
    """
    try:
        return _Reader(skip).key(network)
    except (_NotComparableError, RecursionError):
        return object()  # equal to nothing


def call_key(flat: list[Any]) -> Hashable:
    """The shapes, types and strides of a call's tensors, and its other arguments."""
    return tuple(
        ("tensor", tuple(leaf.shape), leaf.dtype, leaf.stride())
        if isinstance(leaf, torch.Tensor)
        else _Reader(frozenset()).key(leaf)
        for leaf in flat
    )


def mode_key() -> Hashable:
    """Autocast and other modes that change what is captured."""
    kinds = ("cpu", "cuda")
    autocast = tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)
    return (*autocast, torch.get_default_dtype(), str(torch.get_default_device()))

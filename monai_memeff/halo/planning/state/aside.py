"""What `torch.export` changes in torch and Python while it lasts: other threads go on as if it were not so."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace  # its _Patcher was read in torch 2.6 to 2.14

from monai_memeff.memory.threads import unlogged

_LOGS = ("torch.fx.experimental.symbolic_shapes", "torch.export._trace", "torch.export.dynamic_shapes")


@contextlib.contextmanager
def calls_traced_here() -> Iterator[None]:
    """Modules that other threads call are called as ever.

    torch replaces `nn.Module.__call__` and `__getattr__` while it traces, and takes every call for one of the network
    that is traced.
    """
    original, thread = _symbolic_trace._Patcher.patch_method, threading.get_ident()

    def patch_method(patcher: Any, owner: type, name: str, new: Any, deduplicate: bool = True) -> None:
        before = getattr(owner, name)

        def either(*args: Any, **kwargs: Any) -> Any:
            return (new if threading.get_ident() == thread else before)(*args, **kwargs)

        original(patcher, owner, name, either, deduplicate)

    _symbolic_trace._Patcher.patch_method = patch_method
    try:
        yield
    finally:
        _symbolic_trace._Patcher.patch_method = original


class _Either:
    """A compiled module: the plain one in the thread that made this."""

    def __init__(self, module: nn.Module, compiled: Any) -> None:
        self.module, self.compiled, self.thread = module, compiled, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.module._call_impl if threading.get_ident() == self.thread else self.compiled
        return run(*args, **kwargs)


@contextlib.contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """Compiled submodules run their plain code while the block lasts."""
    compiled = [m for m in network.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    kept = [m._compiled_call_impl for m in compiled]
    try:
        for m, call in zip(compiled, kept, strict=True):
            m._compiled_call_impl = _Either(m, call)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for m, call in zip(compiled, kept, strict=True):
            m._compiled_call_impl = call


class _WithoutTorch:
    """A stream that leaves out what torch's own code writes in this thread: it prints the graph before an error."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.thread, self.over = stream, threading.get_ident(), False

    def write(self, text: str) -> int:
        """Write what anyone else writes."""
        file = sys._getframe(1).f_code.co_filename.replace("\\", "/")
        if self.over or threading.get_ident() != self.thread or "/torch/" not in file:
            self.stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Ignoring(threading.local):
    now = False


_ignoring = _Ignoring()


class _InThisThread(type):
    """A category of which every warning is while this thread ignores them."""

    def __subclasscheck__(cls, kind: type) -> bool:
        return _ignoring.now


class _Ignored(Warning, metaclass=_InThisThread):
    """What a filter of Python's names."""


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """No warnings of this thread; `catch_warnings` takes those of others, and puts filters of others away."""
    before = _ignoring.now
    warnings.simplefilter("ignore", _Ignored)
    _ignoring.now = True
    try:
        yield
    finally:
        _ignoring.now = before
        if not before:
            with contextlib.suppress(ValueError):  # others have put theirs in its place
                warnings.filters.remove(("ignore", None, _Ignored, None, 0))  # type: ignore[attr-defined]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Capturing says nothing: what is wrong is raised."""
    stream = _WithoutTorch(sys.stderr)
    try:
        with unlogged(*_LOGS), _unwarned(), contextlib.redirect_stderr(stream):
            yield
    finally:
        stream.over = True

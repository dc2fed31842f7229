"""Code that reads whether it is compiled or exported: while it is captured, it is told what a plain call would tell."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from monai_memeff.halo.planning.reasons import theirs

_capturing: list[int] = []  # the thread whose network is captured
_own: dict[str, Callable[[], bool]] = {}


def _is_compiling() -> bool:
    from monai_memeff.halo.planning.state.compiling import answer

    return answer("is_compiling")


def _is_exporting() -> bool:
    from monai_memeff.halo.planning.state.compiling import answer

    return answer("is_exporting")


_ANSWERS = {"is_compiling": _is_compiling, "is_exporting": _is_exporting}  # torch.compiler's, read in 2.6 to 2.14


@contextlib.contextmanager
def answered_plainly() -> Iterator[None]:
    """The network's own code, and other threads, are told False; torch's code that traces is told what is true.

    The functions get other code, since modules may hold them by names of their own.
    """
    if _capturing:  # by a network that is captured itself
        yield
        return
    found: dict[str, Any] = {name: getattr(torch.compiler, name, None) for name in _ANSWERS}
    kept = {name: function.__code__ for name, function in found.items() if isinstance(function, types.FunctionType)}
    _own.update({name: types.FunctionType(code, found[name].__globals__) for name, code in kept.items()})
    _capturing.append(threading.get_ident())
    try:
        for name in kept:
            found[name].__code__ = _ANSWERS[name].__code__
        yield
    finally:
        for name, code in kept.items():
            found[name].__code__ = code
        _capturing.pop()


_TRACING = "/torch/fx/_symbolic_trace.py"  # refuses compiled code while anything is traced that is not exported


def answer(name: str) -> bool:
    """What the caller's caller is told."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == name:  # torch._utils.is_compiling only passes on
        frame = frame.f_back
    file = "" if frame is None else frame.f_code.co_filename.replace("\\", "/")
    here = threading.get_ident() in _capturing  # elsewhere an optimizer wants to know it of itself
    plain = theirs(file) if here else not file.endswith(_TRACING)
    return False if plain else _own[name]()

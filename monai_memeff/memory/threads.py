"""Threads: what of torch only one may use at a time, what is each one's own, and what outlives none of them."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # read in torch 2.6 to 2.14

P = ParamSpec("P")
R = TypeVar("R")

_alone = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork waits, so that a new process finds everything as it was
    os.register_at_fork(before=_alone.acquire, after_in_parent=_alone.release, after_in_child=_alone.release)

_owned = not torch.__version__ < (2, 14)


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """The function; while one that is marked so runs, other threads wait.

    A network is looked at on tensors without memory by such functions only: `torch.export` and dry runs change the
    network and parts of torch as long as they last.
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _alone:
            return function(*args, **kwargs)

    return alone


def same_stream(device: torch.device | None = None) -> Callable[[], AbstractContextManager[object]]:
    """What another thread enters to work in order with this one.

    Args:
        device: Device of the stream; default this thread's current CUDA device.

    Returns:
        Makes a context with this thread's stream, and its device the current one; one that does nothing where CUDA is
        not in use or ``device`` is another kind of device.
    """
    if not torch.cuda.is_initialized() or (device is not None and device.type != "cuda"):
        return nullcontext
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.stream(stream)


class FakeMode(FakeTensorMode):
    """The mode of tensors without memory, which real ones may join; safe in threads that end.

    Where CUDA finds no device, entering a mode registers a stand-in for CUDA's device guard with the whole process.
    Releases before 2.14 (read and disassembled in 2.11) let the thread that entered first own it: when that thread
    ends, the next use of the guard in any other one crashes. So its owner is the main thread or one that never ends;
    a process that is forked later keeps the stand-in, because no destructor of another thread runs in it.
    """

    def __init__(self) -> None:
        _own_device_guard()
        super().__init__(allow_non_fake_inputs=True)


def _own_device_guard() -> None:
    """Enter a mode once, in a thread that lasts; two threads that come at once start two of them, and both last."""
    global _owned
    if _owned:
        return
    if threading.current_thread() is threading.main_thread():
        _enter()
    else:
        entered = threading.Event()
        threading.Thread(target=_enter_and_stay, args=(entered,), name="device guard", daemon=True).start()
        entered.wait()
    _owned = True


def _enter() -> None:
    with FakeTensorMode():
        pass


def _enter_and_stay(entered: threading.Event) -> None:
    try:
        _enter()
    finally:
        entered.set()
    threading.Event().wait()

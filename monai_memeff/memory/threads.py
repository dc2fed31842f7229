"""Threads: what of torch only one may use at a time, what is each one's own, and what outlives none of them."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # read in torch 2.6 to 2.14

P = ParamSpec("P")
R = TypeVar("R")

_alone = threading.RLock()
_short: list[Any] = []


def short_lock() -> Any:
    """A lock for a few lines that a new process finds open; those that hold one may take those of modules it imports.

    They may not call what :func:`one_at_a_time` marks.
    """
    _short.append(threading.RLock())
    return _short[-1]


def _before_fork() -> None:
    for lock in (_alone, *reversed(_short)):
        lock.acquire()


def _after_fork() -> None:
    for lock in (*_short, _alone):
        lock.release()


if hasattr(os, "register_at_fork"):  # a fork waits, so that a new process finds everything as it was
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)

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


@contextmanager
def unlogged(*names: str) -> Iterator[None]:
    """What is wrong is raised; while the block runs torch's logs do not say the same at length, of this thread.

    Args:
        names: Names of loggers that write themselves; those below them are not meant.
    """
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(of_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(of_others)


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

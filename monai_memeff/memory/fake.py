"""The mode of tensors without memory, entered so that it outlives the thread that entered it first."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # read in torch 2.6 to 2.14

_held = not torch.__version__ < (2, 14)


class FakeMode(FakeTensorMode):
    """`FakeTensorMode`, safe in threads that end.

    Where CUDA finds no device, entering a mode registers a stand-in for CUDA's device guard with the whole process.
    Releases before 2.14 (read and disassembled in 2.11) let the thread that entered first own it: when that thread
    ends, the next use of the guard in any other one crashes. So its owner is the main thread or one that never ends;
    a process that is forked later keeps the stand-in, because no destructor of another thread runs in it.
    """

    def __init__(self, **options: Any) -> None:
        _hold_device_guard()
        super().__init__(**options)


def _hold_device_guard() -> None:
    """Enter a mode once, in a thread that lasts; two threads that come at once start two of them, and both last."""
    global _held
    if _held:
        return
    if threading.current_thread() is threading.main_thread():
        _enter()
    else:
        entered = threading.Event()
        threading.Thread(target=_enter_and_stay, args=(entered,), name="device guard", daemon=True).start()
        entered.wait()
    _held = True


def _enter() -> None:
    with FakeTensorMode():
        pass


def _enter_and_stay(entered: threading.Event) -> None:
    try:
        _enter()
    finally:
        entered.set()
    threading.Event().wait()

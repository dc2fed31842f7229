"""Threads that work for another one on a GPU: CUDA's current device and stream are each thread's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


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

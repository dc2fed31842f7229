"""A bound for what torch may take of a GPU, which makes a planned peak a promise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

SEGMENTS = 40 * 2**20
"""Bytes on top: torch takes memory in segments of up to 20 MiB, and some stay half used."""


@contextlib.contextmanager
def bounded(device: torch.device, nbytes: int | None) -> Iterator[None]:
    """While the block runs, torch's allocator takes at most so many bytes of a GPU more than it has given out.

    Libraries choose kernels with less workspace then; what cannot do with less runs out of memory, as on a full GPU.
    The bound holds for everything in this process.

    Args:
        device: a GPU; others are not bounded.
        nbytes: None for no bound.
    """
    if device.type != "cuda" or nbytes is None:
        yield
        return
    torch.cuda.empty_cache()
    total, before = torch.cuda.mem_get_info(device)[1], _fraction(device)
    wanted = (torch.cuda.memory_reserved(device) + nbytes + SEGMENTS) / total
    torch.cuda.set_per_process_memory_fraction(min(before, wanted), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _fraction(device: torch.device) -> float:
    """The bound there is; older releases of torch do not tell."""
    known = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.7
    return 1.0 if known is None else float(known(device))

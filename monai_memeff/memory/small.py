"""A network that looks at values cannot be run dry: it is measured on small volumes, and a line extended from there."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from monai_memeff.errors import InputError
from monai_memeff.memory.dry import DryRun
from monai_memeff.memory.estimate import line_through
from monai_memeff.memory.meter import measure_peak
from monai_memeff.memory.step import Loss, run_step
from monai_memeff.memory.untouched import home

STEP = 32
"""Small extents leave the same remainder by it as the real ones: a U-Net of five levels then takes both or neither."""

WORST = 0.1
"""Deviation from the line from which on nothing is promised."""


def measured_at_small_sizes(
    network: nn.Module, shape: tuple[int, ...], training: bool, loss: Loss | None, dtype: torch.dtype
) -> tuple[DryRun, str]:
    """Peak by a line through measured peaks of random small volumes, and in words where it comes from.

    Args:
        network: run for real, as a copy.
        shape: Shape of the real input.
        training: also loss and backward pass.
        loss: as in :func:`~monai_memeff.memory.estimate_network`.
        dtype: Type of the input.

    Raises:
        InputError: the network cannot be run on small volumes, or its peaks lie on no line.
    """
    try:
        own = copy.deepcopy(network)
        for first in (1, 2):
            shapes = _small(shape, first)
            try:
                peaks = [_measured(own, small, training, loss, dtype) for small in shapes]
                break
            except (RuntimeError, ValueError):  # too small for its strides, say
                if first == 2:
                    raise
    except Exception as error:  # of the network's own code, of any kind
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{type(network).__name__} looks at values, so it was tried on small volumes, and failed there: "
            f"{type(error).__name__}: {text}"
        ) from error
    if shapes == [shape]:
        return DryRun(peaks[0], 0, None), "measured on this size with random values"
    return DryRun(_extended(network, shapes, peaks, shape), 0, None), (
        "a line through peaks measured on small volumes of random values: the network needs values, or is compiled"
    )


def _small(shape: tuple[int, ...], first: int) -> list[tuple[int, ...]]:
    """Three small shapes of one remainder, or the real one alone if it is small itself."""
    extents = shape[2:]
    lower, upper = ([n % STEP + STEP * k if n > STEP * k else n for n in extents] for k in (first, 2 * first))
    if math.prod(extents) <= math.prod(upper):
        return [shape]
    shapes = [tuple(upper[:k] + lower[k:]) for k in range(len(extents) + 1)]
    chosen = list(dict.fromkeys((shapes[0], shapes[len(shapes) // 2], shapes[-1])))
    return [(*shape[:2], *small) for small in chosen]


def _measured(network: nn.Module, shape: tuple[int, ...], training: bool, loss: Loss | None, dtype: torch.dtype) -> int:
    device = home(network)
    network.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        volume = torch.rand(shape, dtype=dtype).to(device)
        with measure_peak(device) as meter:
            run_step(network, volume, training, loss)
    return meter.peak_bytes


def _extended(
    network: nn.Module, shapes: Sequence[tuple[int, ...]], peaks: Sequence[int], shape: tuple[int, ...]
) -> int:
    line = line_through([math.prod(small[2:]) for small in shapes], peaks)
    if line.worst_error > WORST:
        raise InputError(
            f"{type(network).__name__} looks at values, and its measured peaks {list(peaks)} for {list(shapes)} lie on "
            "no line: measure_peak around a real step tells"
        )
    return line.peak_bytes(shape[2:])

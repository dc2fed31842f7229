"""Parts that fit a budget: found by measuring ever larger ones, and smaller ones when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from monai_memeff.errors import InputError
from monai_memeff.memory.meter import measure_peak


def fitting_part(
    largest: int,
    peak: Callable[[int], int],
    budget: int,
    what: str,
    first: int = 1,
    kept: Callable[[int], int] = lambda part: 0,
) -> int:
    """The largest part, of ``first`` doubled again and again, whose peak is within a budget.

    A part is tried only where twice the peak of half of it fits, so no trial but the first can exceed the budget.

    Args:
        largest: Number of slices or points that nothing exceeds.
        peak: part -> bytes that the work on it takes, measured (:func:`measured_part`) or from a dry run.
        budget: bytes above those that are alive now.
        what: Name of what is counted, for the message.
        first: Number to begin with.
        kept: part -> bytes that lie there all the time.

    Raises:
        InputError: no part fits; it names the bytes that would.
    """
    part, best, least = min(first, largest), 0, None
    while True:
        needed = peak(part)
        if needed + kept(part) <= budget:
            best = part
        least = min(least or needed + kept(part), needed + kept(part))
        larger = min(2 * part, largest)
        if part == largest or needed * larger > budget * part:
            break
        part = larger
    if not best:
        raise InputError(
            f"memory_budget is {budget} bytes, and {min(first, largest)} {what} at a time or a few take {least}: "
            "raise it to that, or take a smaller volume or network"
        )
    return best


def ran_out(error: RuntimeError, device: torch.device) -> bool:
    """Whether an error says that a device had too little memory; its unused cache is given back then."""
    if not isinstance(error, torch.OutOfMemoryError):
        return False
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return True


def measured_part(run: Callable[[int], object], device: torch.device) -> Callable[[int], int]:
    """Part -> peak bytes of real work on it.

    Args:
        run: works on a part of so many and keeps nothing.
        device: where the work happens.
    """

    def peak(part: int) -> int:
        with torch.no_grad(), measure_peak(device) as meter:
            run(part)
        return meter.peak_bytes

    return peak

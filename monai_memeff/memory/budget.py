"""Parts that fit a budget: found by measuring ever larger ones, smaller ones when memory runs out, and a hard bound."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from monai_memeff.errors import InputError
from monai_memeff.memory.meter import measure_peak

_FULL = (  # how libraries of kernels and the host say that memory ran out
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN, where no engine's workspace fits
    "DefaultCPUAllocator",
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_NUMBERS = {  # what torch's messages say
    "wanted": rf"[Tt]ried to allocate {_SIZE}",
    "held": rf"{_SIZE} is allocated by PyTorch",
    "capacity": rf"total capacity of {_SIZE}",
    "free": rf"of which {_SIZE} is free",
    "allowed": rf"{_SIZE} allowed",  # to this process
}


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
        try:
            needed = peak(part)
        except RuntimeError as error:  # the device has less than the budget
            if not best or not _says_full(error):
                raise
            break
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


def ran_out(error: BaseException, device: torch.device) -> bool:
    """Whether an error says that a device had too little memory; its unused cache is given back then."""
    if not _says_full(error):
        return False
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return True


def _says_full(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _FULL)


def lacking(error: BaseException, device: torch.device) -> str:
    """What work that ran out of memory needed, and what there was: the end of a sentence, with bytes where known."""
    said = {name: _bytes(re.search(words, str(error))) for name, words in _NUMBERS.items()}
    if device.type == "cuda" and torch.cuda.is_available():  # kernels of libraries say no numbers
        free, capacity = torch.cuda.mem_get_info(device)
        known = {"capacity": capacity, "free": free, "held": torch.cuda.memory_allocated(device)}
        said = {name: known.get(name) if found is None else found for name, found in said.items()}
    held, wanted, there, free = (said[name] for name in ("held", "wanted", "capacity", "free"))
    if held is None and wanted is None:
        return f"needs more than the memory of {device}"
    needs = f"needs {(held or 0) + (wanted or 0)} bytes of {device} or more"
    if there is None or free is None:
        return needs
    if said["allowed"] is not None:
        there, free = said["allowed"], min(free, max(0, said["allowed"] - (held or 0)))
    return f"{needs}, which has {there} bytes, {free} of them free"


@contextlib.contextmanager
def refusing_when_full(what: str, device: torch.device, way_out: str) -> Iterator[None]:
    """Refuse in one line what has no smaller parts, where the block runs out of a device's memory.

    Args:
        what: begins the line: it "needs so many bytes".
        device: where the block works.
        way_out: ends the line.

    Raises:
        InputError: it names the bytes that were needed and those that are there.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error, device):
            raise
        raise InputError(f"{what} {lacking(error, device)}: {way_out}") from error


def _bytes(found: re.Match[str] | None) -> int | None:
    """Bytes of a number as torch prints it, with two decimals of a unit: the least that it can stand for."""
    if found is None:
        return None
    unit = _UNITS[found[2]]
    return int(found[1]) if unit == 1 else int((float(found[1]) - 0.005) * unit)


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


SEGMENTS = 40 * 2**20
"""Bytes on top: torch takes memory in segments of up to 20 MiB, and some stay half used."""


@dataclass
class _Bounds:
    """What blocks that run now may take of one GPU.

    Attributes:
        start: bytes that torch held when the first of them began.
        before: share of the GPU that torch was allowed then.
        running: bytes that each may take.
    """

    start: int
    before: float
    running: list[int] = field(default_factory=list)


_bounds: dict[torch.device, _Bounds] = {}
_changing = threading.Lock()


@contextlib.contextmanager
def bounded(device: torch.device, nbytes: int | None) -> Iterator[None]:
    """While the block runs, torch's allocator takes at most so many bytes of a GPU more than it has given out.

    Libraries choose kernels with less workspace then; what cannot do with less runs out of memory, as on a full GPU.
    The bound holds for everything in this process; several that run at once in threads add up.

    Args:
        device: a GPU; others are not bounded.
        nbytes: None for no bound.
    """
    if device.type != "cuda" or nbytes is None:
        yield
        return
    with _changing:
        if device not in _bounds:
            torch.cuda.empty_cache()
            known = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.7
            _bounds[device] = _Bounds(torch.cuda.memory_reserved(device), 1.0 if known is None else known(device))
        _bounds[device].running.append(nbytes)
        _apply(device)
    try:
        yield
    finally:
        with _changing:
            _bounds[device].running.remove(nbytes)
            _apply(device)


def _apply(device: torch.device) -> None:
    bounds = _bounds[device]
    wanted = (bounds.start + sum(bounds.running) + SEGMENTS) / torch.cuda.mem_get_info(device)[1]
    share = min(bounds.before, wanted) if bounds.running else _bounds.pop(device).before
    torch.cuda.set_per_process_memory_fraction(share, device)

"""Block sizes of the kernels: a few candidates, timed once for each kind of problem and remembered in a file."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch

from monai_memeff.data.atomic import atomic_write
from monai_memeff.errors import InputError

ENVIRONMENT_VARIABLE = "MEMEFF_TUNING_CACHE"
"""Path of the file, or "off": nothing is timed, read or written, and the first candidate is used."""

FORMAT = 1
"""Written into the file; files of another format are ignored and written anew."""

MIN_ROWS = 4096
"""Smaller problems take the first candidate: their time is that of the launch."""

WARM_UP_RUNS, TIMED_RUNS = 2, 5


@dataclass(frozen=True)
class Blocks:
    """Sizes of one program's tile and how it is compiled.

    Attributes:
        rows: output rows.
        columns: output channels.
        depth: input channels of one product.
        warps: Number of warps of 32 threads.
        stages: Number of stages of the load pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@cache
def candidates(in_channels: int, out_channels: int, dtype: torch.dtype) -> tuple[Blocks, ...]:
    """Block sizes worth timing; the first one is a good guess.

    Args:
        in_channels: Number of channels of the reduction.
        out_channels: Number of channels of the result.
        dtype: float32 tiles take twice the shared memory, so they are half as deep.
    """
    columns = min(rounded(out_channels), 128)
    depth = min(rounded(in_channels), 32 if dtype == torch.float32 else 64)
    # An offset, then a row, then its channels are loaded, each ahead of the next: 4 stages hold one tile, 7 hold two.
    found = [
        Blocks(64, columns, depth, 4, 4),
        Blocks(64, columns, depth, 4, 7),
        Blocks(128, columns, depth, 8 if columns == 128 else 4, 4),
        Blocks(128, columns, depth, 8, 7),
        Blocks(32, columns, depth, 4, 7),
    ]
    if columns > 32:
        found += [Blocks(64, columns // 2, depth, 4, 7), Blocks(128, columns // 2, depth, 4, 4)]
    if depth > 32:
        found.append(Blocks(128, columns, 32, 4, 7))
    return tuple(found)


def rounded(channels: int) -> int:
    """The next power of two, at least 16, which is the least a matrix product takes."""
    return max(16, 1 << (channels - 1).bit_length())


def choose(
    key: str, options: Sequence[Blocks], run: Callable[[Blocks], object], worth_timing: bool, timer: Timer | None = None
) -> Blocks:
    """The remembered choice for a kind of problem, or the fastest of the options, which is then remembered.

    Args:
        key: the kind of problem; one file serves several devices.
        options: what to choose from; a remembered choice that is not among them is not trusted.
        run: does the work with one option, without side effects that matter.
        worth_timing: if False and nothing is remembered, the first option is used.
        timer: milliseconds of a call; default CUDA events.

    Raises:
        RuntimeError: no option runs; chained to what the last one raised.
    """
    if key in _choices and _choices[key] in options:
        return _choices[key]
    if not worth_timing or cache_file() is None:
        return options[0]
    remembered = _read(cache_file()).get(key)
    if remembered is None or remembered not in options:
        remembered = _fastest(options, run, timer or milliseconds)
        _write(cache_file(), key, remembered)
    _choices[key] = remembered
    return remembered


Timer = Callable[[Callable[[], object]], float]

_choices: dict[str, Blocks] = {}
"""What was timed or read in this process."""


def _fastest(options: Sequence[Blocks], run: Callable[[Blocks], object], timer: Timer) -> Blocks:
    times: dict[Blocks, float] = {}
    failure: Exception | None = None
    for option in options:
        try:
            times[option] = timer(lambda option=option: run(option))  # type: ignore[misc]
        except Exception as error:  # too much shared memory, or a compiler that cannot do it
            failure = error
    if not times:
        raise RuntimeError(f"none of {len(options)} block sizes runs on this device.") from failure
    return min(times, key=times.__getitem__)


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the current CUDA device; the first runs compile and warm up."""
    for _ in range(WARM_UP_RUNS):
        call()
    times = []
    for _ in range(TIMED_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@cache
def device_name(device: torch.device) -> str:
    """What block sizes are remembered for: the model of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cache_file() -> Path | None:
    """Where choices are remembered, or None if they are not."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "monai_memeff" / "triton.json"


def _read(file: Path | None) -> dict[str, Blocks]:
    """Everything that can be understood in the file; nothing if there is none."""
    try:
        assert file is not None
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return {}
        return {key: Blocks(*map(int, sizes)) for key, sizes in content["choices"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(file: Path | None, key: str, choice: Blocks) -> None:
    """Add a choice to what the file holds now, by replacing the file at once; a file that cannot be written is left."""
    assert file is not None
    choices = {name: astuple(blocks) for name, blocks in (_read(file) | {key: choice}).items()}
    with contextlib.suppress(OSError, InputError), atomic_write(file) as work:
        work.write_text(json.dumps({"format": FORMAT, "choices": choices}, indent=1), encoding="utf-8")

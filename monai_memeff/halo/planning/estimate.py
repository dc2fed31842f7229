"""Bytes of every step, by a dry run of the code that is executed later."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils import _python_dispatch  # read in torch 2.6 to 2.14

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.layout import Box, narrow
from monai_memeff.halo.planning.rules.base import Env, Reduction, State
from monai_memeff.halo.planning.rules.remember import Remembering
from monai_memeff.halo.planning.rules.windowed.kernels import DRY
from monai_memeff.halo.planning.schedule import Job, Schedule
from monai_memeff.halo.planning.tile import Copies, Worker, compile_tile
from monai_memeff.memory.threads import one_at_a_time
from monai_memeff.memory.tracker import StorageTracker, Watcher

META = torch.device("meta")
Form = tuple[int, ...]
Forms = tuple[Form | None, ...]


class Estimate:
    """Counts the bytes of a schedule's jobs on one kind of device.

    Args:
        schedule: what is to be run.
        device: where; on a GPU the rows read are copies and count too.

    Attributes:
        overlaps: whether copies may run while tiles are computed, which takes memory for the rows of two tiles.
    """

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self.schedule, self.device = schedule, device
        self.overlaps = device.type == "cuda"
        self._wholes: dict[int, torch.Tensor] = {}
        self._known: dict[tuple[int, Forms], int] = {}
        self._signatures: dict[tuple[int, Box], Form] = {}
        self._remembering = Remembering()

    def _whole(self, index: int) -> torch.Tensor:
        if index not in self._wholes:
            value = self.schedule.bound.program[index]
            self._wholes[index] = torch.empty(value.shape, dtype=value.dtype, device=META)
        return self._wholes[index]

    def _load(self, index: int, box: Box, copies: Copies) -> torch.Tensor:
        layout = self.schedule.bound.layouts[index]
        value = self.schedule.bound.program[index]
        copied = (
            self.device.type != "cpu" and index not in self.schedule.kept and index not in value_state(self.schedule)
        )
        if copied or any(hi <= lo for lo, hi in box):
            return torch.empty(layout.part_shape(box), dtype=value.dtype, device=META)
        return narrow(self._whole(index), layout, layout.whole, box)

    def _signature(self, job: Job, box: Box) -> Form:
        if (job.index, box) in self._signatures:
            return self._signatures[job.index, box]
        step = self.schedule.bound.step(job.index)
        key = (job.index, box)
        if hasattr(step, "partial") and len(step.inputs) == 1:
            key = (step.inputs[0], box)
        found: list[int] = [*_form(box, job.domain.rows)]
        for instruction in compile_tile(self.schedule, key):
            index, rows = instruction.key
            found += _form(rows, self.schedule.bound.layouts[index].rows)
        self._signatures[job.index, box] = tuple(found)
        return tuple(found)

    @one_at_a_time
    def tile(self, job: Job, box: Box, before: Box | None = None, after: Box | None = None) -> int:
        """Peak bytes of one tile.

        Args:
            job: The job it is a tile of.
            box: rows of the tile.
            before: rows of the tile whose result is on its way to the store meanwhile.
            after: rows of the tile whose rows are read meanwhile.
        """
        forms = tuple(None if tile is None else self._signature(job, tile) for tile in (before, box, after))
        if (job.index, forms) not in self._known:
            self._known[job.index, forms] = self._dry(job, (before, box), after)
        return self._known[job.index, forms]

    def _dry(self, job: Job, tiles: tuple[Box | None, Box], after: Box | None) -> int:
        before, box = tiles
        wholes = [job.index, *job.sources, *job.taps]
        for index in wholes:
            self._whole(index)
        tracker = StorageTracker("meta", count_older=False)
        worker = Worker(self.schedule, self._load, Env(META))
        states: dict[int, State] = {}
        whole = self._whole(job.index) if job.index in self.schedule.stored else None
        with (
            self._refused(job),
            _python_dispatch._disable_current_modes(),
            torch.no_grad(),
            dry(self.device),
            no_autocast(self.device),
            self._remembering,
            Watcher(tracker),
        ):
            if before is not None:
                kept = worker.tile(job, before, whole, states, box)
                del kept
            # reductions a second time, with the partial results of the first
            again = before is None and (job.taps or isinstance(self.schedule.bound.step(job.index), Reduction))
            for _ in range(2 if again else 1):
                kept = worker.tile(job, box, whole, states, after)
                del kept
            worker.finish()
            for index, state in states.items():
                step = self.schedule.bound.step(index)
                kept = step.finish(state, worker.env)  # type: ignore[attr-defined]
                del kept
        tracker.close()
        return tracker.peak

    @contextlib.contextmanager
    def _refused(self, job: Job) -> Iterator[None]:
        """An operator that cannot be tried without memory is refused by name."""
        try:
            yield
        except NotImplementedError as error:
            value = self.schedule.bound.program[job.index]
            raise NotPartitionableError(
                f"{value.where}: {value.operator}, or an operator beside it, cannot be tried without memory, so its "
                "bytes are not known before the run"
            ) from error

    def job(self, job: Job, tiles: int, limit: float = math.inf, ahead: bool = False) -> int:
        """Peak bytes of a job cut into so many tiles; above a limit, those of the first tile found that exceeds it.

        Args:
            job: the job.
            tiles: number of tiles.
            limit: bytes.
            ahead: whether rows are read and written while others are computed.
        """
        peak, count = 0, len(job.cuts(tiles))
        middle = count // 2  # its tile has neighbors on both sides: as a rule the largest
        for at in (*range(middle, count), *range(middle)):
            peak = max(peak, self._tile_of(job, tiles, at, ahead))
            if peak > limit:
                break
        return peak

    def middle(self, job: Job, tiles: int) -> int:
        """Peak bytes of one tile from the middle of a job cut into so many tiles."""
        return self._tile_of(job, tiles, len(job.cuts(tiles)) // 2, self.overlaps)

    def _tile_of(self, job: Job, tiles: int, at: int, ahead: bool) -> int:
        boxes: list[Box | None] = [None, *(job_box(job, lo, hi) for lo, hi in job.cuts(tiles)), None]
        before, box, after = boxes[at : at + 3]
        assert box is not None
        return self.tile(job, box, before, after) if ahead else self.tile(job, box)

    def kept_bytes(self) -> list[int]:
        """Bytes of the small values that stay on the device while each job runs, its own results included."""
        program, alive, found = self.schedule.bound.program, 0, []
        for job in self.schedule.jobs:
            mine = sum(program[i].nbytes for i in (job.index, *job.taps) if i in self.schedule.kept)
            alive += mine
            found.append(alive)
            alive -= sum(program[i].nbytes for i in job.frees if i in self.schedule.kept)
        return found

    def store_bytes(self) -> int:
        """Highest number of bytes in the store."""
        program, alive, peak = self.schedule.bound.program, 0, 0
        for job in self.schedule.jobs:
            if job.index in self.schedule.stored:
                alive += program[job.index].nbytes
            peak = max(peak, alive)
            alive -= sum(program[i].nbytes for i in job.frees if i in self.schedule.stored)
        return peak


def _form(box: Box, rows: Sequence[int]) -> list[int]:
    """How many rows a box has and whether it touches the ends: tiles of one form cost the same."""
    return [n for (lo, hi), size in zip(box, rows, strict=True) for n in (hi - lo, lo == 0, hi == size)]


def value_state(schedule: Schedule) -> dict[int, str]:
    """Values that are parameters and buffers: they are on the device already."""
    return schedule.bound.program.state


def job_box(job: Job, lo: int, hi: int) -> Box:
    """The box of one tile: the first split axis is cut, others are whole."""
    return ((lo, hi), *job.domain.whole[1:]) if job.domain.spread else job.full


@contextlib.contextmanager
def dry(device: torch.device) -> Iterator[None]:
    """Kernels are chosen as on that device."""
    before, DRY.kind = DRY.kind, device.type
    try:
        yield
    finally:
        DRY.kind = before


@contextlib.contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """A captured network holds autocast's casts; its operators run as they are."""
    with contextlib.ExitStack() as modes:
        for kind in {"cpu", device.type} & {"cpu", "cuda"}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        yield


def by_partitions(estimate: Estimate, partitions: int) -> None:
    """Give every job as few tiles as keep it under the peak of `partitions` equal tiles everywhere."""
    jobs, kept = estimate.schedule.jobs, estimate.kept_bytes()
    peaks = [base + estimate.middle(job, partitions) for job, base in zip(jobs, kept, strict=True)]
    limit = max(peaks, default=0)
    for job, base in zip(jobs, kept, strict=True):
        most = min(partitions, job.rows)
        if not _fewest(estimate, job, base, limit, most):  # a tile at an end needs more than that in the middle
            job.tiles, job.ahead = most, estimate.overlaps and most > 1
            job.peak = base + estimate.job(job, most, ahead=job.ahead)


def by_budget(estimate: Estimate, budget: int, advice: str = "") -> None:
    """Give every job as few tiles as keep it within a budget.

    Raises:
        NotPartitionableError: if one row of a job, or an operator that runs whole, needs more.
    """
    for job, base in zip(estimate.schedule.jobs, estimate.kept_bytes(), strict=True):
        if not _fewest(estimate, job, base, budget, job.rows):
            value = estimate.schedule.bound.program[job.index]
            least = base + estimate.job(job, job.rows)
            raise NotPartitionableError(
                f"{value.where}: {value.operator} needs {least} bytes even in {job.rows} tiles but the memory budget "
                f"is {budget} bytes; allow more{advice}"
            )


def _fewest(estimate: Estimate, job: Job, base: int, limit: int, most: int) -> bool:
    """Set a small number of tiles that keeps within a limit; False if not even `most` do.

    Where copies overlap, up to twice as many are taken for it.
    """
    found = _smallest(estimate, job, limit - base, most, False)
    if found is None:
        return False
    job.tiles, job.ahead = found[0], False
    if estimate.overlaps and job.tiles > 1:
        beside = _smallest(estimate, job, limit - base, min(most, 2 * job.tiles), True)
        if beside is not None:
            found, job.tiles, job.ahead = beside, beside[0], True
    job.peak = base + found[1]
    return True


def _smallest(estimate: Estimate, job: Job, limit: int, most: int, ahead: bool) -> tuple[int, int] | None:
    """A small number of tiles within a limit, and their peak."""
    tiles = 1
    while True:
        peak = estimate.job(job, tiles, limit, ahead)
        if peak <= limit:
            return tiles, peak
        if tiles >= most:
            return None
        # a tile's bytes are roughly a constant plus its share of the rows
        guess = math.ceil(tiles * max(peak, 1) / max(limit, 1)) if limit > 0 else most
        tiles = min(max(tiles + 1, guess), most)

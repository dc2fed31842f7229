"""Plans that store what their tiles would else compute again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol, TypeVar

from monai_memeff.halo.planning.binding import Bound
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.estimate import job_box
from monai_memeff.halo.planning.layout import length
from monai_memeff.halo.planning.schedule import Job, Schedule, make_schedule
from monai_memeff.halo.planning.tile import compile_tile

AGAIN = 0.5  # what the tiles of a job may compute more than once, over the work of the job's own operator
SAMPLE = 16  # tiles of a job that are looked at


class Scheduled(Protocol):
    """What has a schedule."""

    schedule: Schedule


Made = TypeVar("Made", bound=Scheduled)


def without_waste(bound: Bound, make: Callable[[Schedule], Made], scarce: bool) -> Made:
    """The plan of a schedule that spares what costs little, and stores what its tiles would compute too often.

    A tile reads more rows than it makes: few more under a small kernel, many times more under a dilated one or behind
    a resize of a few rows. How many depends on the number of tiles, which depends on what is stored, so a plan is
    made, looked at, and made again. It is also made again where it is refused: rows that are computed take more of the
    device than rows that are read.

    Args:
        bound: the values with their rules.
        make: makes the plan of a schedule.
        scarce: whether what is stored comes out of the budget, so that a plan that stores more needs more.

    Raises:
        NotPartitionableError: the plan is refused with cheap values stored, too.
    """
    schedule = make_schedule(bound)
    try:
        made = make(schedule)
    except NotPartitionableError as refused:
        if not schedule.spared:
            raise
        try:
            return make(make_schedule(bound, schedule.spared))
        except NotPartitionableError as again:
            raise (refused if scarce else again) from None
    held: set[int] = set()
    while wasted := wasteful(made.schedule):
        held |= wasted
        try:
            made = make(make_schedule(bound, held))
        except NotPartitionableError:  # storing more does not fit
            break
    return made


def wasteful(schedule: Schedule) -> set[int]:
    """Values that cost little once and much by the tiles of the plan, the costliest of every job."""
    found: set[int] = set()
    for job in schedule.jobs:
        again = _again(schedule, job)
        allowed = AGAIN * (schedule.bound.step(job.index).work() or 0)
        for index, _ in again.most_common():
            if again.total() <= allowed:
                break
            found.add(index)
            again[index] = 0
    return found


def _again(schedule: Schedule, job: Job) -> Counter[int]:
    """What the tiles of a job compute more than once: work of every value that is spared."""
    twice: Counter[int] = Counter()
    if not _spares(schedule, job):
        return twice
    cuts = job.cuts()
    seen = [cuts[i] for i in sorted({len(cuts) * i // SAMPLE for i in range(SAMPLE)})]
    rows: Counter[int] = Counter()
    for lo, hi in seen:
        for instruction in compile_tile(schedule, (job.index, job_box(job, lo, hi))):
            rows[instruction.key[0]] += length(instruction.key[1])
    for index in schedule.spared & rows.keys():
        whole = length(schedule.bound.layouts[index].whole)
        times = rows[index] / whole * len(cuts) / len(seen)
        twice[index] = int((schedule.bound.step(index).work() or 0) * max(0.0, times - 1))
    return twice


def _spares(schedule: Schedule, job: Job) -> bool:
    """Whether a job computes a spared value on the fly."""
    stack, seen = list(schedule.bound.step(job.index).inputs), set[int]()
    while stack:
        index = stack.pop()
        if index in schedule.spared:
            return True
        if index not in seen and schedule.lazy(index):
            stack += schedule.bound.step(index).inputs
        seen.add(index)
    return False

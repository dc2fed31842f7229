"""What is stored, what is computed again from it, in which order, and when it may go."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from monai_memeff.halo.planning.binding import Bound
from monai_memeff.halo.planning.layout import Box, Layout, _related, bounds
from monai_memeff.halo.planning.rules.base import Reduction, Step, Whole
from monai_memeff.halo.planning.rules.reshape import Expand, Permute, View, WholeView
from monai_memeff.halo.planning.rules.select import Concatenate, Strided

FREE = (View, Permute, Expand, WholeView, Strided)  # no arithmetic
TWICE = 2.0  # a chain of so many element-wise operators that two consumers read is stored

LITTLE = 4  # a value of so much less work than the one that reads it is not stored


@dataclass
class Job:
    """One stored value, computed tile by tile, or one reduction over tiles.

    Attributes:
        index: the value.
        domain: the layout whose rows are cut into tiles.
        full: the box of all rows of the value, for a job that is one tile.
        taps: reductions of this value, fed while its tiles are written.
        sources: stored values it reads, directly or through values computed on the fly.
        frees: stored values that nothing reads after it.
        tiles: number of tiles.
        ahead: whether a tile's rows are read while the one before it is computed.
        peak: bytes on the device while it runs.
    """

    index: int
    domain: Layout
    full: Box
    taps: list[int] = field(default_factory=list)
    sources: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    tiles: int = 1
    ahead: bool = False
    peak: int = 0

    @property
    def rows(self) -> int:
        """Rows that can be cut."""
        return self.domain.rows[0]

    def cuts(self, tiles: int | None = None) -> list[tuple[int, int]]:
        """The row ranges of its tiles."""
        at = bounds(self.rows, tiles or self.tiles)
        return list(itertools.pairwise(at))


@dataclass
class Schedule:
    """The jobs in order.

    Attributes:
        bound: the values with their rules.
        jobs: in order.
        kept: values small enough to stay on the device, whole.
        stored: values that are stored.
        spared: values that are not stored because they cost little beside the only value that reads them.
    """

    bound: Bound
    jobs: list[Job]
    kept: set[int]
    stored: set[int]
    spared: set[int] = field(default_factory=set)

    def lazy(self, index: int) -> bool:
        """Whether a value is computed on the fly."""
        return self.bound.steps[index] is not None and index not in self.stored and index not in self.kept


def _cost(step: Step) -> float:
    if isinstance(step, FREE):
        return 0.0
    return 0.5 if isinstance(step, Concatenate) else 1.0


def _kept(step: Step) -> bool:
    """Small whole values stay on the device."""
    return not step.out.spread


def _must_store(bound: Bound, index: int, step: Step, outputs: set[int]) -> bool:
    return step.heavy or isinstance(step, Whole) or index in outputs


def decide(bound: Bound) -> tuple[set[int], set[int]]:
    """Which values are stored and which are kept on the device."""
    outputs = set(bound.program.wanted())
    kept = {i for i in bound.order if _kept(bound.step(i))}
    stored = {i for i in bound.order if i not in kept and _must_store(bound, i, bound.step(i), outputs)}
    stored |= _read_otherwise(bound)
    stored |= _costly_twice(bound, stored | kept)
    for i in reversed(bound.order):
        if i in stored and i not in outputs and not isinstance(bound.step(i), Whole) and _once(bound, i, stored, kept):
            stored.discard(i)
    return stored, kept


def _cheap(bound: Bound, stored: set[int], kept: set[int]) -> set[int]:
    """Values that cost little beside the only value that reads them: a plan need not store them (`waste.py`)."""
    found, outputs = set(), set(bound.program.wanted())
    readers = {i: [reader for reader in bound.order if i in bound.step(reader).inputs] for i in bound.order}

    def reader(index: int) -> int | None:
        """The only stored value that reads a value, directly or on the fly."""
        while len(readers[index]) == 1:
            index = readers[index][0]
            if index in kept or isinstance(bound.step(index), (Reduction, Whole)):
                return None
            if index in stored:
                return index
        return None

    for i in stored - outputs - _read_otherwise(bound):
        work, into = bound.step(i).work(), reader(i)
        beside = None if into is None else bound.step(into).work()
        if work is not None and beside is not None and LITTLE * work <= beside:
            found.add(i)
    return found


def _read_otherwise(bound: Bound) -> set[int]:
    """Values read in another layout: not stored, all of such a value would be computed for every tile."""
    found = set()
    for i in bound.order:
        step = bound.step(i)
        for source, wanted in zip(step.inputs, step.reads, strict=True):
            native = bound.layouts[source]
            if native.spread and not _related(native, wanted) and bound.steps[source] is not None:
                found.add(source)
    return found


def _costly_twice(bound: Bound, held: set[int]) -> set[int]:
    """Values that several consumers read and that cost much to compute from those held."""
    readers = Counter(source for i in bound.order for source in set(bound.step(i).inputs))
    cost: dict[int, float] = {}
    found = set()
    for i in bound.order:
        if i in held:
            continue
        step = bound.step(i)
        cost[i] = _cost(step) + sum(cost.get(s, 0.0) for s in set(step.inputs))
        if cost[i] >= TWICE and readers[i] > 1:
            found.add(i)
            del cost[i]
    return found


def _once(bound: Bound, index: int, stored: set[int], kept: set[int]) -> bool:
    """Whether a value's rows are wanted exactly once, row for row, by a value that is stored: then it need not be."""
    readers = [i for i in bound.order if index in bound.step(i).inputs]
    if len(readers) != 1 or isinstance(bound.step(readers[0]), (Reduction, Whole)):
        return False
    reader = bound.step(readers[0])
    at = reader.inputs.index(index)
    if type(reader).needs is not Step.needs or reader.inputs.count(index) > 1:
        return False
    if reader.reads[at] != bound.layouts[index] or reader.out.rows != bound.layouts[index].rows:
        return False
    return readers[0] in stored or (readers[0] not in kept and _once(bound, readers[0], stored, kept))


def sources(schedule: Schedule, index: int) -> tuple[int, ...]:
    """Values in the store (or inputs) that a value is computed from."""
    found: dict[int, None] = {}
    stack = list(schedule.bound.step(index).inputs)
    seen = set()
    while stack:
        i = stack.pop()
        if i in seen:
            continue
        seen.add(i)
        if schedule.lazy(i):
            stack += schedule.bound.step(i).inputs
        else:
            found[i] = None
    return tuple(found)


def _feeds(schedule: Schedule, index: int) -> int | None:
    """The stored value whose tiles a reduction can be fed with, if any."""
    step = schedule.bound.step(index)
    if not isinstance(step, Reduction) or len(step.inputs) != 1:
        return None
    source = step.inputs[0]
    if source not in schedule.stored or isinstance(schedule.bound.step(source), Whole):
        return None
    return source if schedule.bound.layouts[source] == step.reads[0] else None


def make_schedule(bound: Bound, held: Collection[int] = ()) -> Schedule:
    """Decide what is stored, order the jobs, and say when each stored value may go.

    Args:
        bound: the values with their rules.
        held: values that are stored although they cost little.
    """
    stored, kept = decide(bound)
    spared = _cheap(bound, stored, kept).difference(held)
    schedule = Schedule(bound, [], kept, stored - spared, spared)
    jobs: dict[int, Job] = {}
    for index in bound.order:
        if schedule.lazy(index):
            continue
        step = bound.step(index)
        host = _feeds(schedule, index)
        if host is not None:
            jobs[host].taps.append(index)
            continue
        domain = step.reads[0] if isinstance(step, Reduction) else step.out
        if isinstance(step, Whole) or (isinstance(step, Reduction) and len(step.inputs) != 1):
            domain = bound.ctx.whole(step.out.shape)
        jobs[index] = Job(index, domain, step.out.whole, sources=sources(schedule, index))
    schedule.jobs = list(jobs.values())
    _lifetimes(schedule)
    return schedule


def _lifetimes(schedule: Schedule) -> None:
    last: dict[int, int] = {}
    for position, job in enumerate(schedule.jobs):
        for i in (job.index, *job.taps, *job.sources):
            last[i] = position
    outputs = set(schedule.bound.program.wanted())
    for position, job in enumerate(schedule.jobs):
        job.frees = tuple(i for i, p in last.items() if p == position and i not in outputs)

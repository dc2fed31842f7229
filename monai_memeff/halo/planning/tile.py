"""One tile as a straight list of steps: what is read, what is computed on the fly, what is dropped when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from monai_memeff.halo.planning.layout import Box, Layout, Write, crop, length, put, source_box
from monai_memeff.halo.planning.rules.base import Env, Read, Reduction, State, Step
from monai_memeff.halo.planning.schedule import Job, Schedule

Key = tuple[int, Box]


class Copies:
    """Copies between store and device, here each at once; on a GPU they may run beside the computation."""

    def read(self, copy: Callable[[], object]) -> None:
        """Read rows into memory that was free for all that is computed so far."""
        copy()

    def arrive(self) -> None:
        """What is computed from here on waits for all that is read."""

    def write(self, copy: Callable[[], object]) -> None:
        """Write rows once they are computed."""
        copy()

    def leave(self) -> None:
        """What is computed from here on waits for all that is written."""


Load = Callable[[int, Box, Copies], torch.Tensor]


@dataclass
class Instruction:
    """Computes (or, without a step, reads) the rows `key[1]` of value `key[0]`.

    Attributes:
        key: value and box.
        step: its rule, None for a read from the store.
        reads: rows the step needs, in its own layouts.
        args: for every read the rows that hold it.
        drops: rows that nothing needs any more.
    """

    key: Key
    step: Step | None
    reads: tuple[Read, ...] = ()
    args: list[Key] = field(default_factory=list)
    drops: list[Key] = field(default_factory=list)


def compile_tile(schedule: Schedule, key: Key, stop: bool = False) -> list[Instruction]:
    """The instructions that make one tile.

    Args:
        schedule: says what is stored.
        key: value and rows.
        stop: whether the value itself may be read from the store.
    """
    bound = schedule.bound
    found: dict[Key, Instruction] = {}

    def visit(k: Key, top: bool) -> None:
        if k in found:
            return
        index, box = k
        if (not top and not schedule.lazy(index)) or bound.steps[index] is None or (length(box) == 0 and not top):
            found[k] = Instruction(k, None)
            return
        step = bound.step(index)
        reads = step.needs(box)
        args: list[Key] = []
        for read in reads:
            source = step.inputs[read.source]
            args.append((source, source_box(bound.layouts[source], step.reads[read.source], read.box)))
            visit(args[-1], False)
        found[k] = Instruction(k, step, reads, args)

    visit(key, not stop)
    order = list(found.values())
    last: dict[Key, Instruction] = {}
    for instruction in order:
        for k in instruction.args:
            last[k] = instruction
    for k, instruction in last.items():
        instruction.drops.append(k)
    return order


def run_tile(
    instructions: list[Instruction], layouts: list[Layout], load: Callable[[int, Box], torch.Tensor], env: Env
) -> torch.Tensor:
    """Run the instructions; returns the last one's rows."""
    values: dict[Key, torch.Tensor] = {}
    for instruction in instructions:
        index, box = instruction.key
        if instruction.step is None:
            values[instruction.key] = load(index, box)
            continue
        step = instruction.step
        tensors = [
            crop(values[k], layouts[k[0]], k[1], step.reads[read.source], read.box)
            for k, read in zip(instruction.args, instruction.reads, strict=True)
        ]
        for k in instruction.drops:
            del values[k]
        values[instruction.key] = step.compute(tensors, instruction.reads, box, env)
        del tensors
    return values[instructions[-1].key]


@dataclass
class Worker:
    """Computes one job's tiles: reads from wholes, writes to one, feeds reductions.

    Told the tile that follows, it reads that one's rows before it computes a tile, and lets a tile's result wait for
    its way to the store until the next is computed: copies that run beside the computation then cost no time.

    Attributes:
        schedule: what is stored and kept.
        load: reads rows of a stored, kept, input or state value onto the device.
        env: device and seed.
        write: writes rows into a place of a whole.
        copies: how rows travel.
    """

    schedule: Schedule
    load: Load
    env: Env
    write: Write = torch.Tensor.copy_
    copies: Copies = field(default_factory=Copies)
    _beside: bool = False
    _ahead: tuple[Box, dict[Key, torch.Tensor]] | None = None
    _leaving: torch.Tensor | None = None

    def tile(
        self, job: Job, box: Box, whole: torch.Tensor | None, states: dict[int, State], following: Box | None = None
    ) -> torch.Tensor | None:
        """Compute one tile: write it to `whole`, add it to the states of the job's reductions.

        Args:
            job: The job it is a tile of.
            box: rows of the tile.
            whole: the stored value, None if it is kept on the device.
            states: partial results of the reductions.
            following: rows of the tile after it, which are read meanwhile; None to read none ahead.

        Returns:
            The value itself if it is kept on the device, else None.
        """
        bound = self.schedule.bound
        instructions = self._instructions(job, box)
        load = self._loader(job, box, instructions, following)
        rows = run_tile(instructions, bound.layouts, load, self.env)
        step = bound.step(job.index)
        if _only_reduces(step):
            index, held = instructions[-1].key
            self._feed(job.index, crop(rows, bound.layouts[index], held, step.reads[0], box), box, states)
            return None
        for tap in job.taps:
            self._feed(tap, rows, box, states)
        if whole is None:
            return rows
        put(whole, bound.layouts[job.index], box, rows, self._store)
        return None

    def finish(self) -> None:
        """End all copies and forget what they held: no tile follows, or another one than was told."""
        self.copies.arrive()
        self.copies.leave()
        self._ahead = self._leaving = None

    def _instructions(self, job: Job, box: Box) -> list[Instruction]:
        step = self.schedule.bound.step(job.index)
        if not _only_reduces(step):
            return compile_tile(self.schedule, (job.index, box))
        source = step.inputs[0]
        key = (source, source_box(self.schedule.bound.layouts[source], step.reads[0], box))
        return compile_tile(self.schedule, key, stop=True)

    def _loader(
        self, job: Job, box: Box, instructions: list[Instruction], following: Box | None
    ) -> Callable[[int, Box], torch.Tensor]:
        """What gives a tile its rows: from what was read ahead, or straight from the store."""
        self._beside = following is not None or self._ahead is not None
        if not self._beside:
            return lambda index, rows: self.load(index, rows, Copies())
        if self._ahead is None or self._ahead[0] != box:
            self.finish()
            self._ahead = box, self._read(instructions)
        here = self._ahead[1]
        self.copies.arrive()
        self._ahead = None if following is None else (following, self._read(self._instructions(job, following)))
        return lambda index, rows: here.pop((index, rows))

    def _read(self, instructions: list[Instruction]) -> dict[Key, torch.Tensor]:
        return {i.key: self.load(*i.key, self.copies) for i in instructions if i.step is None}

    def _store(self, place: torch.Tensor, rows: torch.Tensor) -> None:
        """Let rows leave for the store; beside the computation they are held until the next ones do."""
        if not self._beside:
            self.write(place, rows)
            return
        self.copies.leave()
        self._leaving = None
        rows = rows.contiguous()  # else the copy takes memory that nobody has counted
        self.copies.write(lambda: self.write(place, rows))
        self._leaving = rows

    def _feed(self, index: int, rows: torch.Tensor, box: Box, states: dict[int, State]) -> None:
        step = self.schedule.bound.step(index)
        assert isinstance(step, Reduction)
        part = step.partial(rows, box, self.env)
        states[index] = step.combine(states[index], part) if index in states else part


def _only_reduces(step: Step) -> bool:
    """Whether a job's tiles only feed its own reduction."""
    return isinstance(step, Reduction) and len(step.inputs) == 1

"""One tile as a straight list of steps: what is read, what is computed on the fly, what is dropped when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from monai_memeff.halo.planning.layout import Box, Layout, Write, crop, length, put, source_box
from monai_memeff.halo.planning.rules.base import Env, Read, Reduction, State, Step
from monai_memeff.halo.planning.schedule import Job, Schedule

Key = tuple[int, Box]
Load = Callable[[int, Box], torch.Tensor]


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


def run_tile(instructions: list[Instruction], layouts: list[Layout], load: Load, env: Env) -> torch.Tensor:
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

    Attributes:
        schedule: what is stored and kept.
        load: reads rows of a stored, kept, input or state value onto the device.
        env: device and seed.
        write: writes rows into a place of a whole.
    """

    schedule: Schedule
    load: Load
    env: Env
    write: Write = torch.Tensor.copy_

    def tile(self, job: Job, box: Box, whole: torch.Tensor | None, states: dict[int, State]) -> torch.Tensor | None:
        """Compute one tile: write it to `whole`, add it to the states of the job's reductions.

        Returns:
            The value itself if it is kept on the device, else None.
        """
        bound = self.schedule.bound
        step = bound.step(job.index)
        if isinstance(step, Reduction) and len(step.inputs) == 1:
            key = (step.inputs[0], source_box(bound.layouts[step.inputs[0]], step.reads[0], box))
            rows = run_tile(compile_tile(self.schedule, key, stop=True), bound.layouts, self.load, self.env)
            rows = crop(rows, bound.layouts[key[0]], key[1], step.reads[0], box)
            self._feed(job.index, rows, box, states)
            return None
        rows = run_tile(compile_tile(self.schedule, (job.index, box)), bound.layouts, self.load, self.env)
        for tap in job.taps:
            self._feed(tap, rows, box, states)
        if whole is None:
            return rows
        put(whole, bound.layouts[job.index], box, rows, self.write)
        return None

    def _feed(self, index: int, rows: torch.Tensor, box: Box, states: dict[int, State]) -> None:
        step = self.schedule.bound.step(index)
        assert isinstance(step, Reduction)
        part = step.partial(rows, box, self.env)
        states[index] = step.combine(states[index], part) if index in states else part

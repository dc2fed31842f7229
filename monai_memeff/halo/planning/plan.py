"""The plan of one call: made once for an input shape, printed, and executed; or the reasons why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import as_device
from monai_memeff.halo.planning.binding import bind_program, main_input
from monai_memeff.halo.planning.capture import bare, capture, home
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.estimate import Estimate, by_budget, by_partitions
from monai_memeff.halo.planning.labels import add_labels
from monai_memeff.halo.planning.program import Program
from monai_memeff.halo.planning.rules.base import Reduction, Whole
from monai_memeff.halo.planning.schedule import Job, Schedule
from monai_memeff.halo.planning.waste import without_waste


class Plan:
    """Which value is computed when, in how many tiles, from what, and what it costs.

    Attributes:
        schedule: the jobs.
        axis: spatial axis that is cut.
        device: the device it is made for.
        peak_bytes: highest number of activation bytes on the device (parameters not counted).
        store_bytes: highest number of bytes in the store (the caller's input not counted).
        moved_bytes: bytes read from and written to the store.
        partitions: number of tiles of the most finely cut job.
        budget: bytes the plan was made for, None if it was made for a number of partitions.

    Examples:
        >>> made = plan(torch.nn.Conv3d(1, 2, 3, padding=1), (1, 1, 64, 64, 64), partitions=8)
        >>> made.peak_bytes, made.store_bytes, made.whole_operators()
        (425984, 2097152, [])
    """

    def __init__(
        self, schedule: Schedule, axis: int, device: torch.device, estimate: Estimate, budget: int | None
    ) -> None:
        self.schedule, self.axis, self.device, self.budget = schedule, axis, device, budget
        self.peak_bytes = max((job.peak for job in schedule.jobs), default=0)
        self.store_bytes = estimate.store_bytes()
        self.partitions = max((job.tiles for job in schedule.jobs), default=1)
        self.moved_bytes = sum(written_bytes(schedule, job) + self._read_bytes(job) for job in schedule.jobs)

    def fresh_budget(self, budget: int | None) -> bool:
        """Whether the plan still fits a budget (free memory changes between calls)."""
        return budget is None or self.peak_bytes <= budget

    def _read_bytes(self, job: Job) -> int:
        return sum(self.schedule.bound.program[i].nbytes for i in job.sources if i in self.schedule.stored)

    def __str__(self) -> str:
        """One line for each job."""
        program = self.schedule.bound.program
        lines = [
            f"{len(self.schedule.jobs)} steps in up to {self.partitions} tiles along spatial axis {self.axis}; "
            f"peak {_mega(self.peak_bytes)} on the device, {_mega(self.store_bytes)} stored, "
            f"{_mega(self.moved_bytes)} moved",
            f"{'module':40} {'operator':28} {'rows':>6} {'tiles':>5} {'peak':>10} {'stored':>10}  reads",
        ]
        for job in self.schedule.jobs:
            value, step = program[job.index], self.schedule.bound.step(job.index)
            kind = " (whole)" if isinstance(step, Whole) and value.dependent else ""
            kind = " (all rows)" if isinstance(step, Reduction) else kind
            reads = ", ".join(program[i].name for i in job.sources if i not in program.state)
            lines.append(
                f"{value.where.module[-40:]:40} {(value.operator + kind)[:28]:28} {job.rows:6} {job.tiles:5} "
                f"{_mega(job.peak):>10} {_mega(written_bytes(self.schedule, job)):>10}  {value.name} <- {reads}"
            )
        return "\n".join(lines)

    def whole_operators(self) -> list[str]:
        """Operators that run on the whole volume, with their modules."""
        found = []
        for job in self.schedule.jobs:
            value, step = self.schedule.bound.program[job.index], self.schedule.bound.step(job.index)
            if isinstance(step, Whole) and value.dependent:
                found.append(f"{value.where}: {value.operator}")
        return found


def written_bytes(schedule: Schedule, job: Job) -> int:
    """Bytes a job writes to the store."""
    return schedule.bound.program[job.index].nbytes if job.index in schedule.stored else 0


def _mega(n: int) -> str:
    return f"{n / 1e6:.2f} MB"


def examples(inputs: Any, network: nn.Module) -> tuple[Any, ...]:
    """Example arguments of a shape, or of a tuple of arguments as it is."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if isinstance(inputs, Sequence) and inputs and all(isinstance(n, int) and not isinstance(n, bool) for n in inputs):
        kinds = [p.dtype for p in bare(network).parameters() if p.is_floating_point()]
        return (torch.empty(tuple(inputs), dtype=kinds[0] if kinds else torch.float32, device="meta"),)
    return tuple(inputs)


@numbers_checked
def plan(
    network: nn.Module,
    inputs: Any,
    partitions: int | str = "auto",
    memory_budget: int | None = None,
    axis: int = 0,
    device: torch.device | str | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Plan:
    """The plan by which a network is streamed through one device; nothing is computed.

    Args:
        network: any nn.Module; it is not changed.
        inputs: shape of the input (B, C, spatial...), or a tuple of example arguments on any device, meta included.
        partitions: number of tiles along `axis`, or "auto": as few as `memory_budget` allows.
        memory_budget: bytes for activations on the device; without it "auto" makes one tile.
        axis: spatial axis that is cut.
        device: the device to plan for; by default the network's.
        kwargs: example keyword arguments.

    Raises:
        NotPartitionableError: what cannot be run in parts, by module, operator and line; or no plan fits the budget.
        ValueError: for partitions < 1 or an unknown word.

    Examples:
        >>> network = torch.nn.Conv3d(1, 4, 3, padding=1)
        >>> plan(network, (1, 1, 64, 64, 64), partitions=8).partitions
        8
    """
    if partitions != "auto" and (not isinstance(partitions, int) or isinstance(partitions, bool) or partitions < 1):
        raise ValueError(f"partitions must be a positive number or 'auto' but is {partitions!r}.")
    target = as_device(device) if device is not None else home(bare(network))
    return make_plan(network, examples(inputs, network), kwargs or {}, partitions, memory_budget, axis, target)


def make_plan(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    partitions: int | str,
    budget: int | None,
    axis: int,
    device: torch.device,
    labels: bool | str = False,
    share_store: bool = False,
    program: Program | None = None,
) -> Plan:
    """The plan of one call.

    Args:
        network: any nn.Module.
        args: the call's arguments, or examples of them.
        kwargs: keyword arguments likewise.
        partitions: number of tiles or "auto".
        budget: bytes, for "auto"; a limit where a number of partitions is given.
        axis: spatial axis that is cut.
        device: where the work happens.
        labels: True, False or "regions".
        share_store: whether the store's bytes come out of the budget too.
        program: the one of another plan of the same call and labels, which then need not be captured again.
    """
    if program is None:
        with torch.no_grad():
            program = capture(network, args, kwargs)
        if labels:
            add_labels(program, len(main_input(program)) - 2, labels == "regions")

    def make(schedule: Schedule) -> Plan:
        return _tiled(schedule, partitions, budget, axis, device, share_store)

    return without_waste(bind_program(program, (axis,)), make, share_store)


def _tiled(
    schedule: Schedule, partitions: int | str, budget: int | None, axis: int, device: torch.device, share_store: bool
) -> Plan:
    """The plan that executes a schedule, with its numbers of tiles."""
    estimate = Estimate(schedule, device)
    if budget is not None and partitions == "auto":
        stored = estimate.store_bytes() if share_store else 0
        advice = ", or give store= a folder" if share_store else ""
        if stored >= budget:
            raise NotPartitionableError(
                f"the store alone needs {stored} bytes of host memory but {budget} may be used; "
                "free some, or give store= a folder on a local disk"
            )
        by_budget(estimate, budget - stored, advice)
    else:
        by_partitions(estimate, 1 if partitions == "auto" else int(partitions))
    made = Plan(schedule, axis, device, estimate, budget)
    if budget is not None and made.peak_bytes > budget:
        raise NotPartitionableError(
            f"{partitions} partitions need {made.peak_bytes} bytes but the memory budget is {budget} bytes; "
            "use more partitions, or partitions='auto'"
        )
    return made


@numbers_checked
def explain(network: nn.Module, inputs: Any, axis: int = 0, kwargs: dict[str, Any] | None = None) -> list[str]:
    """The reasons why a network cannot be partitioned exactly; empty if it can.

    Args:
        network: any nn.Module; it is not changed, and nothing is computed.
        inputs: shape of the input (B, C, spatial...), or a tuple of example arguments on any device, meta included.
        axis: spatial axis that is to be cut.
        kwargs: example keyword arguments.

    Returns:
        One line for each reason: module path, operator, the user's line.

    Examples:
        >>> explain(torch.nn.Conv3d(1, 1, 3), (1, 1, 16, 16, 16))
        []
    """
    try:
        with torch.no_grad():
            program = capture(network, examples(inputs, network), kwargs)
        bind_program(program, (axis,))
    except NotPartitionableError as refusal:
        return refusal.reasons
    return []


__all__ = ["Plan", "examples", "explain", "make_plan", "plan", "written_bytes"]

"""What streaming a network through one device costs: the plan that the inferer then executes."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from torch import nn

from monai_memeff.errors import InputError
from monai_memeff.halo.inferer import SpatialPartitionInferer
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.estimate import job_box
from monai_memeff.halo.planning.layout import length
from monai_memeff.halo.planning.plan import Plan
from monai_memeff.halo.planning.program import Program
from monai_memeff.halo.planning.schedule import Schedule
from monai_memeff.halo.planning.tile import compile_tile
from monai_memeff.memory.dry import DryRun
from monai_memeff.memory.forecast import NetworkEstimate
from monai_memeff.memory.network import Question, described
from monai_memeff.memory.untouched import home

PARTITIONS = 8
"""Parts where no budget says how many."""


def is_own(network: nn.Module) -> bool:
    """Halo runs other people's networks."""
    return False


def estimate(question: Question) -> NetworkEstimate:
    """The plan for a budget, or for eight parts, and what it costs.

    Where the device is the CPU, the budget holds the store too; if it cannot, the store goes into a folder.

    Raises:
        InputError: training, a network that cannot be run in parts, or a budget that no plan fits.
    """
    if question.training:
        raise InputError(
            "halo trains over several devices and streams inference through one: training by one device has no plan; "
            "take system='clstm', or train with the overlay halo under torchrun"
        )
    try:
        inferer, plan = _planned(question)
    except NotPartitionableError as refusal:
        raise InputError(f"halo cannot run {type(question.network).__name__} so: {refusal}") from refusal
    assert question.dense is not None
    work = _repeated(plan) * (question.dense.multiplications or 0)
    found = DryRun(plan.peak_bytes, round(work), torch.empty(question.dense.output_shape or (0,), device="meta"))
    stored, on_disk = plan.store_bytes, inferer.store != "host"
    return described(
        question,
        found,
        "halo",
        question.network,
        basis=f"the plan: {len(plan.schedule.jobs)} steps in up to {plan.partitions} tiles",
        host_bytes=0 if on_disk else stored,
        disk_bytes=stored if on_disk else 0,
        setting=_setting(inferer),
        plan=plan,
        inferer=inferer,
    )


def _planned(question: Question) -> tuple[SpatialPartitionInferer, Plan]:
    budget = question.memory_budget
    if budget is None:
        return _plan(question, None, partitions=PARTITIONS)
    if question.device.type != "cpu":
        return _plan(question, None, memory_budget=budget)
    first = _plan(question, None, partitions=1)[1]
    program = first.schedule.bound.program
    if first.store_bytes < budget:
        try:
            return _plan(question, program, memory_budget=budget - first.store_bytes)
        except NotPartitionableError:
            pass  # the store leaves too little: on disk it takes none
    return _plan(question, program, memory_budget=budget, store=tempfile.gettempdir())


def _plan(question: Question, program: Program | None, **options: Any) -> tuple[SpatialPartitionInferer, Plan]:
    axis = max(range(len(question.shape) - 2), key=lambda n: question.shape[2 + n])
    device = None if question.device == home(question.network) else question.device
    inferer = SpatialPartitionInferer(axis=axis, device=device, **options)
    example = torch.empty(question.shape, dtype=question.dtype, device="meta")
    return inferer, inferer.prepare(example, question.network, program)


def _setting(inferer: SpatialPartitionInferer) -> dict[str, Any]:
    names = ("partitions", "memory_budget", "store", "axis")
    return {name: getattr(inferer, name) for name in names if getattr(inferer, name) is not None}


def _repeated(plan: Plan) -> float:
    """Rows that are computed over rows that there are, weighed by the multiplications that each takes."""
    schedule, done = plan.schedule, 0.0
    layouts, bound = schedule.bound.layouts, schedule.bound
    work = [_work(schedule, index) if step is not None else 0.0 for index, step in enumerate(bound.steps)]
    for job in schedule.jobs:
        for lo, hi in job.cuts():
            for instruction in compile_tile(schedule, (job.index, job_box(job, lo, hi))):
                index, rows = instruction.key
                if instruction.step is not None:
                    done += work[index] * length(rows) / max(1, length(layouts[index].whole))
    once = sum(work)
    return done / once if once else 1.0


def _work(schedule: Schedule, index: int) -> float:
    """Multiplications of a convolution or matrix product; 0 of anything else."""
    value = schedule.bound.program[index]
    if not any(word in value.operator for word in ("conv", "linear", "mm", "matmul", "einsum")):
        return 0.0
    inputs = [schedule.bound.program[i] for i in value.refs()]
    weights = [math.prod(other.shape[1:]) for other in inputs[1:2]]
    return float(math.prod(value.shape) * (weights[0] if weights else 1))

"""One operator on one rank: rows are fetched, the rule computes, and the rank keeps what is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from monai_memeff.halo.planning.layout import Box, Layout, crop, length, narrow
from monai_memeff.halo.planning.program import Value
from monai_memeff.halo.planning.rules.base import Env, Read, Reduction, Step
from monai_memeff.halo.run.ranks.comm.exchange import gather_partials
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.executor import nothing, tied
from monai_memeff.halo.run.ranks.placement import Move


class Setting(Protocol):
    """What an operator's run knows of the plan that it belongs to."""

    mesh: HaloMesh
    device: torch.device

    def env(self) -> Env:
        """The working device and the seed of this call."""


@dataclass(frozen=True)
class Fetch:
    """How one rank gets rows of a value in the layout in which a rule reads them.

    Attributes:
        source: which of the reader's inputs it is.
        move: the rows that travel.
        layout: the layout that the rule wants.
        box: rows in that layout; None where this rank only sends.
    """

    source: int
    move: Move
    layout: Layout
    box: Box | None

    def __call__(self, mesh: HaloMesh, x: torch.Tensor) -> torch.Tensor:
        """The rows."""
        rows = self.move(mesh, x)
        return rows if self.box is None else crop(rows, self.move.layout, self.move.want, self.layout, self.box)


@dataclass
class TiledRun:
    """Output rows of this rank from the input rows that its rule names."""

    plan: Setting
    step: Step
    fetches: list[Fetch]
    reads: tuple[Read, ...]
    box: Box

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        rows = [(f, f(self.plan.mesh, inputs[f.source])) for f in self.fetches]
        if not length(self.box):
            shape = self.step.out.part_shape(self.box)
            return nothing(shape, self.step.value.dtype, [t for _, t in rows], self.plan.device)
        wanted = [t for f, t in rows if f.box is not None]
        order = [f for f, _ in rows if f.box is not None]
        queues = {s: iter([t for f, t in zip(order, wanted, strict=True) if f.source == s]) for s in range(len(inputs))}
        y = self.step.compute([next(queues[r.source]) for r in self.reads], self.reads, self.box, self.plan.env())
        return tied(y, [t for f, t in rows if f.box is None])


@dataclass
class UnlinkedRun:
    """An operator that no gradient goes through, on ranks without rows either, or they would wait for the others."""

    run: TiledRun

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.run(*[x.detach() for x in inputs])


def is_unlinked(value: Value) -> bool:
    """Whether a value has no gradient whatever it is made from: `detach`, `zeros_like`, running statistics."""
    if value.target == "halo.running":
        return True
    name = str(getattr(value.target, "overloadpacket", "")).rpartition(".")[2]
    return name == "detach" or name.endswith("_like") or name.startswith("new_")


@dataclass
class WholeRun:
    """The operator on whole inputs; this rank keeps its rows."""

    plan: Setting
    step: Step
    fetches: list[Fetch]
    box: Box

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        whole = [f(self.plan.mesh, inputs[f.source]) for f in self.fetches]
        reads = [Read(f.source, self.step.reads[f.source].whole) for f in self.fetches]
        y = self.step.compute(whole, reads, self.step.out.whole, self.plan.env())
        return narrow(y, self.step.out, self.step.out.whole, self.box)


@dataclass
class ReducedRun:
    """Partial results of this rank's rows, combined with those of the others in the order of the ranks."""

    plan: Setting
    step: Reduction
    fetches: list[Fetch]
    boxes: list[Box]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        mesh, step, env = self.plan.mesh, self.step, self.plan.env()
        rows, *_ = [f(mesh, inputs[f.source]) for f in self.fetches]
        box = self.boxes[mesh.comm.rank]
        if length(box):
            partial = step.partial(rows, box, env)
        else:  # stands in for the shapes; no rank reads it
            one = tuple((0, 1) for _ in box)
            partial = step.partial(rows.new_zeros(step.reads[0].part_shape(one)), one, env)
            partial = tuple(tied(t, [rows]) for t in partial)
        states = gather_partials(mesh.comm, partial)
        full = [tuple(state) for state, b in zip(states, self.boxes, strict=True) if length(b)]
        total = full[0]
        for state in full[1:]:
            total = step.combine(total, state)
        return step.finish(total, env)

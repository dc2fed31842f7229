"""A plan for ranks: for every value of a captured network the rows each rank holds, and the moves that feed its rule.

All of it follows from shapes and cuts, so every rank works out the same plan; no rank decides by looking at a tensor.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from monai_memeff.halo.planning.binding import Bound, bind_program
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.layout import Box, along, length, source_box, unspread
from monai_memeff.halo.planning.program import Program, Ref, check_memory, unflatten
from monai_memeff.halo.planning.rules.base import Env, Read, Reduction, Step, Whole
from monai_memeff.halo.planning.rules.norm import Moments, Normalize
from monai_memeff.halo.planning.rules.random import is_random
from monai_memeff.halo.planning.rules.windowed.convolution import DirectConvolution
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.executor import Task, anchored, run_in_segments, run_tasks
from monai_memeff.halo.run.ranks.layers.activations import activate_in_place, same
from monai_memeff.halo.run.ranks.layers.fused import FusedMoments, FusedNormalize, form_of
from monai_memeff.halo.run.ranks.layers.norm import Form
from monai_memeff.halo.run.ranks.layers.rims import rim_convolution
from monai_memeff.halo.run.ranks.operators import Fetch, ReducedRun, TiledRun, UnlinkedRun, WholeRun, is_unlinked
from monai_memeff.halo.run.ranks.parts import Part, mark, same_on_all_ranks, same_on_some_ranks
from monai_memeff.halo.run.ranks.placement import Placement, move, place


class RankPlan:
    """One rank's plan of a captured network.

    Args:
        program: the network captured at the whole shape.
        mesh: where the parts live.
        parts: how each leaf of the arguments is spread; None for what every rank holds whole.
    """

    def __init__(self, program: Program, mesh: HaloMesh, parts: Sequence[Part | None]) -> None:
        self.program, self.mesh = program, mesh
        bound = bind_program(program, mesh.axes, training=True)
        first = next(p for p in parts if p is not None)
        self.base = [(b, first.shape[d]) for b, d in zip(_all_cut(first), first.dims, strict=True)]
        self.placements = {index: place(layout, self.base, mesh.spatial) for index, layout in enumerate(bound.layouts)}
        self.tasks: list[Task] = []
        self.forms: dict[int, Form | None] = {}
        self.moments: dict[str, int] = {}
        self.random = any(is_random(program.values[index]) for index in bound.order)
        self.seed = 0
        self.kept = [*program.wanted(), *program.mutations.values()]
        for position, index in program.inputs.items():
            self.placements[index] = self._given(program.values[index].shape, parts[position])
        self.readers = _readers_of_moments(bound)
        for index in bound.order:
            self._add(index, bound.step(index))
        activate_in_place(program, self.tasks, self.placements, self.kept)
        for position, index in program.input_mutations.items():
            if self.placements[program.inputs[position]] != self.placements[index]:
                raise NotPartitionableError(
                    f"{program.values[index].where}: the network writes into its argument {position} rows that lie on "
                    f"other ranks; give it a copy"
                )

    def _given(self, shape: tuple[int, ...], part: Part | None) -> Placement:
        axes = len(self.mesh.axes)
        if part is None:
            return Placement(unspread(shape, axes), (None,) * axes, self.mesh.spatial)
        layout = part.layout or along(shape, dict(enumerate(part.dims)), axes)
        return Placement(layout, part.cuts, self.mesh.spatial)

    def _add(self, index: int, step: Step) -> None:
        out = self.placements[index]
        known = self.moments.setdefault(repr(step.value.args), index) if isinstance(step, Moments) else index
        if known != index:  # batch norm's result and its two running statistics need the same moments
            self.forms[index] = self.forms[known]
            self.tasks.append(Task(index, (known,), same))
            return
        form = self.forms[index] = self._form(index, step)
        if form is not None:
            kind = FusedMoments if isinstance(step, Moments) else FusedNormalize
            run: Any = kind(self.mesh, step.value, form)
        elif isinstance(step, Reduction) and not out.spread:
            run = self._reduction(step)
        elif isinstance(step, (Whole, Reduction)):
            run = self._whole(step, out)
        else:
            run = self._tiled(step, out)
            run = UnlinkedRun(run) if is_unlinked(step.value) else run
        self.tasks.append(Task(index, step.inputs, run))

    def _form(self, index: int, step: Step) -> Form | None:
        """How torch's own kernels do a norm, if they fit both its moments and its step."""
        if isinstance(step, Moments):
            fits = all(_fits(reader, step) for reader in self.readers[repr(step.value.args)])
            return form_of(self.program, self.placements[step.inputs[0]], index) if fits else None
        return self.forms.get(step.inputs[1]) if isinstance(step, Normalize) else None

    def fetches(self, step: Step, source: int, boxes: Sequence[Sequence[Box]]) -> list[Fetch]:
        """Moves that bring an input to all ranks; `boxes` are the rows each rank reads, several where it wraps."""
        native, wanted = self.placements[step.inputs[source]], step.reads[source]
        found, rank = [], self.mesh.comm.rank
        for k in range(max(len(b) for b in boxes)):
            reads = [b[k] if k < len(b) else None for b in boxes]
            wants = [_no_rows(native) if box is None else source_box(native.layout, wanted, box) for box in reads]
            found.append(Fetch(source, move(native, wants, rank), wanted, reads[rank]))
        return found

    def _tiled(self, step: Step, out: Placement) -> Any:
        boxes, rank = out.boxes(), self.mesh.comm.rank
        if isinstance(step, DirectConvolution) and not any(self.placements[i].spread for i in step.inputs[1:]):
            found = rim_convolution(self.mesh, step, self.placements[step.inputs[0]], boxes)
            if found is not None:
                return found
        reads = [step.needs(box) if length(box) else () for box in boxes]
        fetches, mine = [], reads[rank]
        margins = self._margins(step, boxes[rank])
        if margins:
            native = self.placements[step.inputs[0]]
            gets = move(native, [rs[0].box if rs else _no_rows(native) for rs in reads], rank, margins)
            fetches.append(Fetch(0, gets, step.reads[0], gets.want))
            mine = (Read(0, gets.want), *mine[1:])
        for source in range(1 if margins else 0, len(step.inputs)):
            fetches += self.fetches(step, source, [[r.box for r in rs if r.source == source] for rs in reads])
        return TiledRun(self, step, fetches, mine, boxes[rank])

    def _margins(self, step: Step, box: Box) -> tuple[tuple[int, int], ...]:
        """Zeros that a convolution has on one side of this rank's rows only: they are laid into the window that is
        made for its neighbors' rows anyway, where the rule would copy all rows once more. Empty if there are none."""
        native = self.placements[step.inputs[0]].layout if step.inputs else None
        if not isinstance(step, DirectConvolution) or native != step.reads[0] or not length(box):
            return ()
        rows, found = step.needs(box)[0].box, []
        if not length(rows):
            return ()
        for axis in range(len(rows)):
            low, high = step.span(axis, box) if axis in step.sliding else rows[axis]
            before, after = rows[axis][0] - low, high - rows[axis][1]
            found.append((before, after) if before != after else (0, 0))
        return tuple(found) if any(map(any, found)) else ()

    def _whole(self, step: Step, out: Placement) -> Any:
        fetches = []
        for source, layout in enumerate(step.reads):
            fetches += self.fetches(step, source, [[layout.whole]] * self.mesh.size)
        return WholeRun(self, step, fetches, out.box(self.mesh.comm.rank))

    def _reduction(self, step: Reduction) -> Any:
        source = place(step.reads[0], self.base, self.mesh.spatial)
        boxes = source.boxes()
        held = [[box] if length(box) else [] for box in boxes]
        fetches = self.fetches(step, 0, held)
        for other in range(1, len(step.reads)):
            fetches += self.fetches(step, other, [[step.reads[other].whole]] * self.mesh.size)
        return ReducedRun(self, step, fetches, boxes)

    def env(self) -> Env:
        """Where rules work, and the seed of the call."""
        return Env(self.device, self.seed)

    def run(self, network: nn.Module, leaves: Sequence[Any], segments: int) -> Any:
        """The network's output on this rank: parts of spread outputs, whole others."""
        program = self.program
        first = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        self.device = first.device
        if self.random:
            self.seed = self._agreed_seed()
        check_memory(program, leaves, [*network.parameters(), *network.buffers()] if program.input_mutations else ())
        values = {index: leaves[position].as_subclass(torch.Tensor) for position, index in program.inputs.items()}
        for index, name in program.state.items():
            constant = program.constants.get(name)
            tensor = attrgetter(name)(network) if constant is None else constant.to(self.device)
            values[index] = tensor.clone() if name in program.mutations else tensor  # written to before backward reads
        given = [_memory(value) for value in values.values()]
        with ExitStack() as modes:
            for kind in {"cpu", self.device.type} & {"cpu", "cuda"}:  # the captured network holds autocast's casts
                modes.enter_context(torch.autocast(kind, enabled=False))
            if segments > 1 and torch.is_grad_enabled():
                run_in_segments(self.tasks, values, self.kept, segments)
            else:
                run_tasks(self.tasks, values, self.kept)
            return self._finish(network, leaves, values, given)

    def _agreed_seed(self) -> int:
        """The first rank's draw; the others draw too, so that all generators move on alike."""
        return int(self.mesh.comm.all_gather(draw_seed().to(self.mesh.device))[0])

    def _finish(self, network: nn.Module, leaves: Sequence[Any], values: dict[int, Any], given: Sequence[int]) -> Any:
        program = self.program
        with torch.no_grad():
            for name, index in program.mutations.items():
                attrgetter(name)(network).copy_(values[index])
            for position, index in program.input_mutations.items():
                leaves[position].copy_(values[index])
        refs = list(dict.fromkeys(leaf.index for leaf in program.outputs if isinstance(leaf, Ref)))
        shared = Counter([*given, *(_memory(values[index]) for index in refs)])
        found = {index: anchored(values[index], shared[_memory(values[index])] == 1) for index in refs}
        for index in refs:
            part = _part(program.values[index].shape, self.placements[index])
            if not part.spread:
                found[index] = same_on_all_ranks(found[index])
            elif any(cut is None and size > 1 for cut, size in zip(part.cuts, self.mesh.spatial, strict=True)):
                found[index] = same_on_some_ranks(found[index])
            mark(found[index], part)
        outputs = [found[leaf.index] if isinstance(leaf, Ref) else leaf for leaf in program.outputs]
        return unflatten(outputs, program.output_spec)


def _readers_of_moments(bound: Bound) -> dict[str, list[Step]]:
    """The steps that read moments, by what those are of."""
    found = defaultdict[str, list[Step]](list)
    for step in map(bound.step, bound.order):
        for source in step.inputs:
            if bound.program.values[source].target == "halo.moments":
                found[repr(bound.program.values[source].args)].append(step)
    return found


def _fits(reader: Step, moments: Moments) -> bool:
    """Whether a step needs no gradient through moments, or holds what they contribute to it."""
    if reader.value.target == "halo.running":
        return True
    if not isinstance(reader, Normalize) or reader.value.args[-1]:
        return False
    return bool(reader.value.args[0] == moments.value.args[0] and reader.inputs[0] == reader.value.refs()[0])


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor lies; one that FSDP2 spreads lies where nobody else does."""
    return int(getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata)


def draw_seed() -> torch.Tensor:
    """A seed from torch's generator, which a checkpoint around the network restores before it recomputes."""
    return torch.randint(2**62, (1,))


def _no_rows(placement: Placement) -> Box:
    return tuple((0, 0) if p is not None else (0, 1) for p in placement.layout.places)


def _all_cut(part: Part) -> list[tuple[int, ...]]:
    return [b for b in part.cuts if b is not None]


def _part(shape: tuple[int, ...], placement: Placement) -> Part:
    layout = placement.layout
    dims = tuple(0 if p is None else p[0] for p in layout.places)
    folded = any(p is not None and not layout.plain(p[0]) for p in layout.places)
    return Part(shape, dims, placement.cuts, layout if folded else None)

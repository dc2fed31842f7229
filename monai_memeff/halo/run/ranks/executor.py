"""Runs a plan on this rank's rows: the same tasks in the same order on every rank, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_memeff.halo.run.ranks.first_order import first_order


class _Nothing(torch.autograd.Function):
    """A rank's share of a node of which it owns no rows, still tied to its inputs: backward must pass on every rank."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], dtype: torch.dtype, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) for t in inputs]
        return torch.empty(tuple(shape), dtype=dtype, device=inputs[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if dtype.is_floating_point else None
            for shape, dtype, device in ctx.like
        ]
        return (None, None, *zeros)


def nothing(
    shape: Sequence[int], dtype: torch.dtype, inputs: Sequence[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """An empty tensor that depends on all inputs."""
    if not inputs or not dtype.is_floating_point:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return _Nothing.apply(shape, dtype, *inputs)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) for t in others]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (gradient, *[torch.zeros(s, dtype=d, device=v) for s, d, v in ctx.like])


def tied(x: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor itself, whose backward also reaches tensors that it was not made from, with zeros."""
    others = [t for t in others if t.is_floating_point()]
    return _Tied.apply(x, *others) if others and x.is_floating_point() else x


class _Anchor(torch.autograd.Function):
    """An output as it is. Backward looks at a saved tensor first, so that a checkpoint around the network recomputes
    here on every rank, before any rank answers for a gradient."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, alone: bool) -> torch.Tensor:
        ctx.save_for_backward(output.new_zeros(1))
        return output.detach() if alone else output.view_as(output)  # torch refuses to write into such a view

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        _ = ctx.saved_tensors
        return gradient, None


def anchored(output: torch.Tensor, alone: bool) -> torch.Tensor:
    """An output of the network; `alone` if nothing else that the caller sees lies in its memory, so that autograd is
    right about what the caller writes into it."""
    return _Anchor.apply(output, alone) if output.is_floating_point() or output.is_complex() else output


@dataclass
class Task:
    """One value of the plan on this rank.

    Attributes:
        name: index of the value it makes.
        reads: indices of the values it needs.
        run: computes it from those values.
    """

    name: int
    reads: tuple[int, ...]
    run: Callable[..., Any]


def last_uses(tasks: Sequence[Task], kept: Sequence[int]) -> list[list[int]]:
    """Values that nobody reads after each step, so that they can go."""
    seen, found = set(kept), []
    for task in reversed(tasks):
        gone = [name for name in {*task.reads, task.name} if name not in seen]
        seen.update(gone)
        found.append(gone)
    return found[::-1]


def run_tasks(tasks: Sequence[Task], values: dict[int, Any], kept: Sequence[int]) -> None:
    """Fill in `values`, and drop what is no longer needed."""
    for task, gone in zip(tasks, last_uses(tasks, kept), strict=True):
        values[task.name] = task.run(*[values[name] for name in task.reads])
        for name in gone:
            values.pop(name, None)


class _Segment(torch.autograd.Function):
    """Steps whose values are not kept: backward runs them again first, then goes back through them.

    torch's checkpoint starts its second pass when the first saved tensor is wanted, which may be before one exchange on
    one rank and after it on another. Here it starts before anything else, so ranks meet in one order.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Sequence[torch.Tensor]], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)  # what nobody used has no gradient, as in the whole
        ctx.save_for_backward(*inputs)
        outputs = tuple(t.detach() for t in run(*inputs))
        ctx.mark_non_differentiable(*[t for t in outputs if not t.is_floating_point()])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        inputs = [t.detach() for t in ctx.saved_tensors]
        for i in wanted:
            inputs[i].requires_grad_()
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        pairs = [(t, g) for t, g in zip(outputs, gradients, strict=True) if t.requires_grad and g is not None]
        found = torch.autograd.grad(
            [t for t, _ in pairs], [inputs[i] for i in wanted], [g for _, g in pairs], allow_unused=True
        )
        back: list[torch.Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(wanted, found, strict=True):
            back[i] = gradient
        return (None, *back)


def run_in_segments(tasks: Sequence[Task], values: dict[int, Any], kept: Sequence[int], segments: int) -> None:
    """As `run_tasks`, remembering only what passes between segments; the last segment is run plainly."""
    cuts = [len(tasks) * i // segments for i in range(segments + 1)]
    for start, stop in pairwise(cuts[:-1]):
        _run_segment(tasks[start:stop], values, _read_later(tasks[stop:], kept))
    run_tasks(tasks[cuts[-2] :], values, kept)


def _read_later(tasks: Sequence[Task], kept: Sequence[int]) -> set[int]:
    return {name for task in tasks for name in task.reads} | set(kept)


def _run_segment(tasks: Sequence[Task], values: dict[int, Any], later: set[int]) -> None:
    made = {task.name for task in tasks}
    inputs = [n for n in dict.fromkeys(n for s in tasks for n in s.reads) if n not in made]
    outputs = [task.name for task in tasks if task.name in later]
    tensors = [n for n in inputs if isinstance(values[n], torch.Tensor)]
    others = {n: values[n] for n in inputs if n not in tensors}

    def run(*given: torch.Tensor) -> list[Any]:
        inner = {**others, **dict(zip(tensors, given, strict=True))}
        run_tasks(tasks, inner, outputs)
        return [inner[n] for n in outputs]

    results = _Segment.apply(run, *[values[n] for n in tensors])
    values.update(zip(outputs, results, strict=True))
    for name in [n for n in values if n not in later]:
        del values[name]

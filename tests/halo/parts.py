"""The plainest executor of rules: every value whole, computed box by box. Rules are tested with it, against torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from monai_memeff.halo.planning.binding import Bound, bind_program
from monai_memeff.halo.planning.capture import capture
from monai_memeff.halo.planning.layout import Box, Layout, crop, narrow, put, source_box
from monai_memeff.halo.planning.program import Ref, flatten_call
from monai_memeff.halo.planning.rules.base import Env, Read, Reduction, Step, Whole


def boxes(layout: Layout, cuts: Sequence[Sequence[float]]) -> list[Box]:
    """All boxes of a layout cut at these fractions, one list for each axis."""
    ranges = []
    for axis, rows in enumerate(layout.rows):
        at = sorted({0, rows, *(round(c * rows) for c in cuts[axis])})
        ranges.append(list(itertools.pairwise(at)))
    return list(itertools.product(*ranges))


class Parts:
    """Runs a bound program box by box."""

    def __init__(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: tuple[int, ...], cuts: Any
    ):
        self.program = capture(network, args, kwargs)
        self.bound: Bound = bind_program(self.program, axes)
        self.cuts, self.env = cuts, Env(torch.device("cpu"))
        state = dict(network.named_parameters(remove_duplicate=False))
        state.update(network.named_buffers(remove_duplicate=False))
        state.update(self.program.constants)
        flat, _ = flatten_call(args, kwargs)
        self.values = {i: flat[position] for position, i in self.program.inputs.items()}
        self.values.update({i: state[name] for i, name in self.program.state.items()})

    def rows(self, step: Step, read: Read) -> torch.Tensor:
        """The rows of one read."""
        index, wanted = step.inputs[read.source], step.reads[read.source]
        native = self.bound.layouts[index]
        have = source_box(native, wanted, read.box)
        return crop(narrow(self.values[index], native, native.whole, have), native, have, wanted, read.box)

    def value(self, step: Step) -> torch.Tensor:
        """The whole result of a step."""
        if isinstance(step, Reduction):
            state = None
            for box in boxes(step.reads[0], self.cuts):
                part = step.partial(self.rows(step, Read(0, box)), box, self.env)
                state = part if state is None else step.combine(state, part)
            return step.finish(state, self.env)
        out = torch.empty(step.value.shape, dtype=step.value.dtype)
        for box in [step.out.whole] if isinstance(step, Whole) else boxes(step.out, self.cuts):
            reads = step.needs(box)
            part = step.compute([self.rows(step, r) for r in reads], reads, box, self.env)
            assert (tuple(part.shape), part.dtype) == (step.out.part_shape(box), step.value.dtype), step
            put(out, step.out, box, part)
        return out

    def __call__(self) -> Any:
        """What the network returns."""
        for index in self.bound.order:
            step = self.bound.step(index)
            self.values[index] = self.value(step)
            found = self.values[index]
            assert (found.shape, found.dtype) == (step.value.shape, step.value.dtype), step
        leaves = [self.values[leaf.index] if isinstance(leaf, Ref) else leaf for leaf in self.program.outputs]
        return pytree.tree_unflatten(leaves, self.program.output_spec)

    def whole_operators(self) -> list[str]:
        """Operators on the volume that run whole."""
        steps = [self.bound.step(i) for i in self.bound.order]
        return [s.value.operator for s in steps if isinstance(s, Whole) and s.value.dependent]


def error(actual: Any, expected: Any) -> float:
    """The largest difference over the largest value, of all tensors of two nested results; inf if they are unlike."""
    worst = 0.0
    a, e = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(a) == len(e)
    for x, y in zip(a, e, strict=True):
        if not isinstance(y, torch.Tensor):
            assert x == y
            continue
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert torch.equal(torch.isfinite(x), torch.isfinite(y))
        x, y = (torch.nan_to_num(t.double(), 0, 0, 0) for t in (x, y))
        if y.numel():
            worst = max(worst, ((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item())
    return worst


def in_parts(
    network: nn.Module, *args: Any, axes: tuple[int, ...] = (0,), cuts: Any = None, tiled: bool = True, **kwargs: Any
) -> float:
    """The error of a network run box by box, over the plain result; `tiled` demands that nothing ran whole."""
    with torch.no_grad():
        expected = network(*args, **kwargs)
        parts = Parts(network, args, kwargs, axes, cuts or [(0.3, 0.55)] * len(axes))
        found = error(parts(), expected)
    if tiled:
        assert not parts.whole_operators(), parts.whole_operators()
    return found

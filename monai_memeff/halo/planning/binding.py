"""Every value of a program with its rule and its layout: what both executors run."""

from __future__ import annotations

from dataclasses import dataclass

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.layout import Layout
from monai_memeff.halo.planning.program import Program
from monai_memeff.halo.planning.rules import bind
from monai_memeff.halo.planning.rules.base import Context, Step


@dataclass
class Bound:
    """A program with rules.

    Attributes:
        program: the captured network.
        ctx: split axes and number of spatial dimensions.
        layouts: The layout of every value.
        steps: The step of every value; None for inputs, state and values that no output needs.
        order: indices of the steps in order of execution.
    """

    program: Program
    ctx: Context
    layouts: list[Layout]
    steps: list[Step | None]
    order: list[int]

    def step(self, index: int) -> Step:
        """The step of a value."""
        step = self.steps[index]
        assert step is not None
        return step


def needed(program: Program, wanted: list[int]) -> set[int]:
    """Indices of all values that the wanted ones are made from, themselves included."""
    found: set[int] = set()
    stack = list(wanted)
    while stack:
        index = stack.pop()
        if index not in found:
            found.add(index)
            stack += program[index].refs()
    return found


def main_input(program: Program) -> tuple[int, ...]:
    """Shape of the volume: the first tensor argument with spatial dimensions."""
    for index in program.inputs.values():
        if len(program[index].shape) >= 3:
            return program[index].shape
    raise NotPartitionableError("the network takes no volume: its first tensor must be (B, C, spatial...)")


def bind_program(program: Program, axes: tuple[int, ...], training: bool = False) -> Bound:
    """Bind every value that is needed to its rule.

    Args:
        program: a captured network.
        axes: spatial axes that are cut.
        training: whether the new contents of buffers are needed too.

    Raises:
        NotPartitionableError: with one reason for each operator that cannot be run at all, or an axis out of range.
    """
    shape = main_input(program)
    dims = len(shape) - 2
    for axis in axes:
        if not 0 <= axis < dims:
            raise NotPartitionableError(f"axis is {axis} but the volume has the spatial axes 0 to {dims - 1}")
    sizes = frozenset(
        program[i].shape[2 + a] for i in program.inputs.values() if len(program[i].shape) == dims + 2 for a in axes
    )
    ctx = Context(axes, dims, sizes)
    wanted = program.wanted() + (list(program.mutations.values()) if training else [])
    keep = needed(program, wanted)
    layouts: list[Layout] = []
    steps: list[Step | None] = []
    reasons: list[str] = []
    for index, value in enumerate(program.values):
        step = None
        if value.target is None:
            volume = index in program.inputs.values() and len(value.shape) == dims + 2
            layouts.append(ctx.default(value.shape) if volume else ctx.whole(value.shape))
        elif index not in keep:
            layouts.append(ctx.whole(value.shape))
        else:
            natives = [layouts[i] for i in value.refs()]
            try:
                step = bind(value, natives, ctx)
                layouts.append(step.out)
            except NotPartitionableError as refusal:
                reasons += [r for r in refusal.reasons if r not in reasons]
                layouts.append(ctx.whole(value.shape))
        steps.append(step)
        assert layouts[index].shape == value.shape, (value, layouts[index])
    if reasons:
        raise NotPartitionableError(reasons)
    return Bound(program, ctx, layouts, steps, [i for i, s in enumerate(steps) if s is not None])

"""An activation of a result that nobody else reads works in the result's memory, as `inplace=True` does in the network.

The captured network is free of writing, so an activation would keep its input for backward beside its output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from monai_memeff.halo.planning.program import Program, Value
from monai_memeff.halo.run.ranks.executor import Task
from monai_memeff.halo.run.ranks.layers.fused import FusedNormalize
from monai_memeff.halo.run.ranks.layers.rims import RimConvolution
from monai_memeff.halo.run.ranks.placement import Placement

_FRESH = (FusedNormalize, RimConvolution)  # their results are new tensors that their backward does not look at
Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Activated:
    """A step, and the activation in its result."""

    run: Callable[..., torch.Tensor]
    activation: Activation

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.activation(self.run(*inputs))


def same(value: torch.Tensor) -> torch.Tensor:
    """The value, for a step that has been done by another."""
    return value


def in_place(value: Value) -> Activation | None:
    """The activation that makes a value, if its backward needs the result alone."""
    name = str(value.target)
    if name == "aten.relu.default":
        return torch.relu_
    if name == "aten.leaky_relu.default":
        slope = value.args[1] if len(value.args) > 1 else value.kwargs.get("negative_slope", 0.01)
        return (lambda x: F.leaky_relu_(x, slope)) if isinstance(slope, (int, float)) and slope >= 0 else None
    return None


def activate_in_place(
    program: Program, tasks: Sequence[Task], placements: dict[int, Placement], kept: Collection[int]
) -> None:
    """Let steps do the activation of their results.

    Args:
        program: the captured network.
        tasks: one rank's steps, changed here.
        placements: how every value is spread.
        kept: values that are read after the last step.
    """
    readers = Counter(name for task in tasks for name in task.reads)
    makers: dict[int, Any] = {task.name: task for task in tasks if isinstance(task.run, _FRESH)}
    for task in tasks:
        activation = in_place(program.values[task.name])
        source = makers.get(task.reads[0]) if activation and task.reads else None
        if activation is None or source is None or readers[source.name] > 1 or {source.name, task.name} & {*kept}:
            continue  # a caller may write into an output
        if placements[source.name] == placements[task.name]:
            source.run, task.run = Activated(source.run, activation), same

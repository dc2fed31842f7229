"""Labels instead of logits, computed tile by tile: what is stored is one small number for each voxel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Layout
from monai_memeff.halo.planning.program import Program, Ref, Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, free
from monai_memeff.halo.planning.rules.table import rule


class Labels(Step):
    """Logits to labels."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The labels of the rows."""
        logits, regions = tensors[0], self.value.args[1]
        if regions or logits.shape[1] == 1:
            return (logits > 0).to(self.value.dtype)
        return logits.argmax(1, keepdim=True).to(self.value.dtype)


@rule("halo.labels", "labels", "logit > 0 of one channel or of regions, else arg-max")
def bind_labels(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """One small number for each voxel."""
    native = natives[0]
    free(native, [1])
    if len(native.shape) != ctx.dims + 2:
        raise NoTileError("not a volume")
    dims = (native.dims[0], ((value.shape[1], -1),), *native.dims[2:])
    return Labels(value, value.refs(), [native], Layout(dims, native.axes))


def add_labels(program: Program, dims: int, regions: bool) -> None:
    """Let a program return labels in the place of every floating-point volume.

    Args:
        program: changed in place.
        dims: number of spatial dimensions.
        regions: whether channels are regions that may overlap, each labeled by itself.
    """
    for i, leaf in enumerate(program.outputs):
        if not isinstance(leaf, Ref):
            continue
        value = program[leaf]
        if len(value.shape) != dims + 2 or not value.dtype.is_floating_point:
            continue
        channels = value.shape[1]
        dtype = torch.uint8 if regions or channels <= 256 else torch.int16
        shape = (value.shape[0], channels if regions else 1, *value.shape[2:])
        made = Value(f"labels_{i}", shape, dtype, "halo.labels", (leaf, regions), where=value.where)
        made.dependent = value.dependent
        program.outputs[i] = program.add(made)

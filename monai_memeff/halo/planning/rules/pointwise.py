"""Operators whose output rows are made from the same rows of their inputs: by torch's tag, and some untagged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Layout
from monai_memeff.halo.planning.program import Ref, Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, aligned, broadcast_layout
from monai_memeff.halo.planning.rules.table import Expansion, expander, rule

UNTAGGED = [
    "selu",
    "celu",
    "relu6",
    "hardsigmoid",
    "hardswish",
    "mish",
    "silu",
    "gelu",
    "log_sigmoid",
    "threshold",
    "hardtanh",
    "leaky_relu",
    "elu",
    "softplus",
    "alias",
    "clone",
    "contiguous",
    "detach",
    "_to_copy",
    "lift_fresh_copy",
    "to",
    "type_as",
    "positive",
    "where",
    "masked_fill",
    "clamp",
    "clip",
    "square",
    "absolute",
    "true_divide",
    "floor_divide",
    "multiply",
    "subtract",
    "divide",
    "rsub",
    "negative",
    "not_equal",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "isfinite",
    "isinf",
    "isnan",
    "nan_to_num",
    "softshrink",
    "hardshrink",
    "tanhshrink",
    "logit",
    "xlogy",
    "addcmul",
    "addcdiv",
    "lerp",
    "fake_quantize_per_tensor_affine",
    "arctan2",
    "fix",
    "_conj",
    "real",
    "conj",
    "resolve_conj",
    "resolve_neg",
    "bitwise_and",
    "bitwise_or",
    "dequantize",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
]


@rule(UNTAGGED, "pointwise", "row for row, broadcast as torch does")
def bind_pointwise(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A step that maps rows one to one."""
    out = broadcast_layout(value.shape, natives, ctx)
    reads = [aligned(n.shape, out) for n in natives]
    return Step(value, value.refs(), reads, out)


def is_pointwise(target: Any) -> bool:
    """Whether torch tags the operator as pointwise and free of random numbers."""
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


class Create(Step):
    """A constant of a volume's shape: only the wanted rows are made."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The constant in the rows' shape."""
        name = str(self.value.target)
        shape = self.out.part_shape(box)
        fills = {"zeros": 0, "new_zeros": 0, "ones": 1, "new_ones": 1}
        head = name.split(".")[1]
        number = fills.get(head)
        if number is None:
            number = self.value.args[2] if head == "new_full" else self.value.args[1]
        return torch.full(shape, number, dtype=self.value.dtype, device=env.device)


@rule(
    ["zeros.default", "ones.default", "full.default", "new_zeros.default", "new_ones.default", "new_full.default"],
    "constant",
    "made in the rows' shape",
)
def bind_create(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A constant tensor; a number given as a tensor makes it run whole."""
    if any(isinstance(x, Ref) for x in value.args[1:]):
        raise NoTileError("a number given as a tensor")
    out = ctx.default(value.shape) if ctx.volume(value.shape) else ctx.whole(value.shape)
    return Create(value, (), (), out)


@expander(["feature_dropout", "alpha_dropout", "feature_alpha_dropout"])
def drop_dropout(x: Expansion) -> Ref | None:
    """Dropout in evaluation mode is its input."""
    p, train = x.value.args[1], x.value.args[2]
    if x.value.pick not in (None, 0) or (train and p > 0):
        return None
    source: Ref = x.value.args[0]
    return source

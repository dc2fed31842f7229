"""Operators that mix some dimensions only: products, attention, softmax, norms of the last dimensions."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Dim, Layout
from monai_memeff.halo.planning.program import Ref, Value
from monai_memeff.halo.planning.rules.base import Context, Step, aligned, arguments, free
from monai_memeff.halo.planning.rules.norm import spread_norm
from monai_memeff.halo.planning.rules.table import Expansion, expander, rule

_ONE_DIM = [
    "softmax.int",
    "_softmax.default",
    "log_softmax.int",
    "_log_softmax.default",
    "cumsum.default",
    "cumprod.default",
    "logcumsumexp.default",
    "cummax.default",
    "cummin.default",
    "sort.default",
    "sort.stable",
    "argsort.default",
    "topk.default",
    "kthvalue.default",
    "median.dim",
    "mode.default",
    "glu.default",
    "index_select.default",
    "diff.default",
]


@rule(_ONE_DIM, "mixing", "along a dimension that is not cut")
def bind_one_dim(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """An operator along one dimension."""
    native, args = natives[0], arguments(value)
    if str(value.target).startswith("aten.diff") and len(natives) > 1:
        raise NoTileError("rows put before or after")
    n = len(native.shape)
    if not n or len(value.shape) != n:
        return _dropped(value, natives, ctx, args)
    dim = (args["dim"] if args.get("dim") is not None else -1) % n
    free(native, [dim])
    dims = list(native.dims)
    dims[dim] = ((value.shape[dim], -1),)
    reads = [native, *(ctx.whole(x.shape) for x in natives[1:])]
    return Step(value, value.refs(), reads, Layout(tuple(dims), native.axes))


def _dropped(value: Value, natives: Sequence[Layout], ctx: Context, args: dict[str, Any]) -> Step:
    native = natives[0]
    n = len(native.shape)
    if len(value.shape) != n - 1:
        raise NoTileError("an unusual shape")
    dim = args["dim"] % n
    free(native, [dim])
    return Step(
        value, value.refs(), [native], Layout(tuple(f for d, f in enumerate(native.dims) if d != dim), native.axes)
    )


@rule(["prelu.default", "_prelu_kernel.default"], "pointwise", "one slope for every channel")
def bind_prelu(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A leaky slope for every channel."""
    native, weight = natives
    if len(weight.shape) == len(native.shape) and len(weight.shape) > 1:
        return Step(value, value.refs(), [native, aligned(weight.shape, native)], native)
    if len(native.shape) > 1:
        free(native, [1])
    return Step(value, value.refs(), [native, ctx.whole(weight.shape)], native)


@rule("linear.default", "mixing", "over the last dimension")
def bind_linear(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A linear layer over the last dimension."""
    native = natives[0]
    free(native, [-1])
    if natives[1].spread:
        raise NoTileError("a spread weight")
    out = Layout(
        (*native.dims[: len(value.shape) - 1], *[((n, -1),) for n in value.shape[len(native.dims) - 1 :]]), native.axes
    )
    step = Step(value, value.refs(), [native, *(ctx.whole(x.shape) for x in natives[1:])], out)
    step.heavy = True
    return step


class Product(Step):
    """A product of matrices or tensors, by the labels of its dimensions."""

    heavy = True


def bind_labels(value: Value, natives: Sequence[Layout], labels: Sequence[str], result: str) -> Step:
    """A step whose dimensions are named: a label that is cut must reach the result and is not summed over.

    Raises:
        NoTileError: if a split dimension is summed over.
    """
    axes = natives[0].axes
    cut: dict[str, Dim] = {}
    for axis in range(axes):
        for native, names in zip(natives, labels, strict=True):
            d = native.dim_of(axis)
            if d is not None and names[d] in result and names.count(names[d]) == 1:
                at = result.index(names[d])
                if value.shape[at] == native.shape[d] and not any(a == axis for f in cut.values() for _, a in f):
                    cut.setdefault(names[d], native.dims[d])
                    break
    if not cut:
        raise NoTileError("the split axis is summed over")

    def layout(shape: Sequence[int], names: str) -> Layout:
        dims = [
            cut[c] if c in cut and n == value.shape[result.index(c)] else ((int(n), -1),)
            for n, c in zip(shape, names, strict=True)
        ]
        return Layout(tuple(dims), axes)

    reads = [layout(n.shape, names) for n, names in zip(natives, labels, strict=True)]
    return Product(value, value.refs(), reads, layout(value.shape, result))


@rule(
    ["matmul.default", "bmm.default", "mm.default", "baddbmm.default", "addmm.default"],
    "mixing",
    "rows of a batch or of the left matrix",
)
def bind_matmul(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A matrix product, batched or not."""
    if not any(n.spread for n in natives):
        raise NoTileError("whole matrices")
    left, right = natives[-2:]
    n = len(value.shape)
    if len(left.shape) < 2 or len(right.shape) < 2:
        raise NoTileError("a product with a vector")
    batch = string.ascii_lowercase[: n - 2]
    names = [batch[n - len(m.shape) :] + e for m, e in ((left, "XY"), (right, "YZ"))]
    if len(natives) == 3:
        names.insert(0, (batch + "XZ")[n - len(natives[0].shape) :])
    return bind_labels(value, natives, names, batch + "XZ")


@rule("einsum.default", "mixing", "a label that is not summed over")
def bind_einsum(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """An Einstein sum without an ellipsis."""
    equation = value.args[0].replace(" ", "")
    if "." in equation or not any(n.spread for n in natives):
        raise NoTileError("an ellipsis")
    left, arrow, right = equation.partition("->")
    names = left.split(",")
    if not arrow:
        flat = "".join(names)
        right = "".join(sorted(c for c in set(flat) if flat.count(c) == 1))
    return bind_labels(value, natives, names, right)


@rule("scaled_dot_product_attention.default", "attention", "rows of a batch or of the queries")
def bind_attention(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Attention; every query looks at all keys, which are read whole."""
    args = arguments(value)
    if args["dropout_p"]:
        raise NoTileError("dropout inside attention")
    if not any(n.spread for n in natives) or args["enable_gqa"] or args["is_causal"]:
        raise NoTileError("whole attention")
    n = len(value.shape)
    batch = string.ascii_lowercase[: n - 2]
    names = [batch[n - len(x.shape) :] + e for x, e in zip(natives[:3], ("LE", "SE", "SV"), strict=True)]
    if len(natives) == 4:
        names.append((batch + "LS")[n - len(natives[3].shape) :])
    return bind_labels(value, natives, names, batch + "LV")


@expander(["layer_norm.default", "native_layer_norm.default"])
def expand_layer_norm(x: Expansion) -> Ref | None:
    """A layer norm over many dimensions is moments and an affine step; over the last one it stays one operator."""
    args = arguments(x.value)
    if len(args["normalized_shape"]) == 1 or x.value.pick not in (None, 0):
        return None
    return spread_norm(x, args["input"], args["normalized_shape"], args["weight"], args["bias"], args["eps"])


@rule(
    ["layer_norm.default", "rms_norm.default", "native_layer_norm.default", "_fused_rms_norm.default"],
    "norm",
    "over the last dimensions",
)
def bind_last(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A norm over the last dimensions, none of which is cut."""
    native, count = natives[0], len(arguments(value)["normalized_shape"])
    if value.pick not in (None, 0):
        raise NoTileError("statistics of a norm")
    free(native, list(range(-count, 0)))
    return Step(value, value.refs(), [native, *(ctx.whole(n.shape) for n in natives[1:])], native)


class Sampler(Step):
    """Samples of a whole image at rows of a grid."""

    heavy = True


@rule(
    ["grid_sampler.default", "grid_sampler_3d.default", "grid_sampler_2d.default"],
    "resize",
    "rows of the grid; the image whole",
)
def bind_sampler(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Sampling at a grid."""
    image, grid = natives
    n = len(value.shape)
    where = grid if grid.spread else image
    if not where.spread:
        raise NoTileError("whole images")
    out = ctx.default(value.shape)
    spots = Layout((out.dims[0], *out.dims[2:], ((n - 2, -1),)), out.axes)
    return Sampler(value, value.refs(), [ctx.whole(image.shape), spots], out)

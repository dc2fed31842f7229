"""Reductions in every spelling: partial results of the rows, combined; row by row along uncut dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Dim, Layout
from monai_memeff.halo.planning.program import Ref, Value
from monai_memeff.halo.planning.rules.base import Context, Env, Reduction, State, Step, arguments
from monai_memeff.halo.planning.rules.extremes import combined, with_count
from monai_memeff.halo.planning.rules.table import Expansion, expander, rule

DimList = list[int]


def _wide(x: torch.Tensor) -> torch.dtype:
    if not x.is_floating_point():
        return x.dtype if x.is_complex() else torch.int64
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Way:
    """One reduction: (rows, dims, args) -> state, two states -> one, (state, count, args) -> result."""

    partial: Callable[[torch.Tensor, DimList, dict[str, Any]], State]
    combine: Callable[[State, State], State]
    finish: Callable[[State, int, dict[str, Any]], torch.Tensor]


def _double(x: torch.Tensor) -> torch.Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def _sum(x: torch.Tensor, dims: DimList, args: dict[str, Any]) -> State:
    x = x if args.get("dtype") is None else x.to(args["dtype"])
    return (_double(x.sum(dims, keepdim=True, dtype=_wide(x))),)


def _moments(x: torch.Tensor, dims: DimList, args: dict[str, Any]) -> State:
    n = math.prod(x.shape[d] for d in dims)
    var, mean = torch.var_mean(x.to(_wide(x)), dims, correction=0, keepdim=True)
    return torch.full((), n, dtype=torch.float64, device=x.device), _double(mean), var.double() * n


def _add_moments(a: State, b: State) -> State:
    (na, ma, sa), (nb, mb, sb) = a, b
    n, delta = na + nb, mb - ma
    square = (delta * delta.conj()).real if delta.is_complex() else delta * delta
    return n, ma + delta * (nb / n), sa + sb + square * (na * nb / n)


def _variance(state: State, count: int, args: dict[str, Any]) -> torch.Tensor:
    correction = args.get("correction", 1)
    if "unbiased" in args:
        correction = int(bool(args["unbiased"]))
    correction = 1 if correction is None else correction
    return state[2] / max(count - correction, 0)


def _root(x: torch.Tensor) -> torch.Tensor:
    """The square root, with no gradient at zero, as torch's standard deviation has it."""
    return torch.where(x == 0, x, torch.where(x == 0, 1, x).sqrt())


def _norm_partial(x: torch.Tensor, dims: DimList, args: dict[str, Any]) -> State:
    p = _order(args)
    dtype = args.get("dtype")
    x = x.to(dtype) if dtype is not None else x
    if x.is_floating_point():
        x = x.to(_wide(x))
    found = torch.linalg.vector_norm(x, p, dims, keepdim=True)
    if not math.isinf(p):
        return (_double(found),)
    found, count = with_count(found, x.abs(), dims)
    return _double(found), count


def _order(args: dict[str, Any]) -> float:
    p = args.get("ord", args.get("p", 2))
    return 2.0 if p is None or p == "fro" else float(p)


def _same(state: State, count: int, args: dict[str, Any]) -> torch.Tensor:
    return state[0]


def _product(x: torch.Tensor, dims: DimList, args: dict[str, Any]) -> State:
    x = x.to(args["dtype"]) if args.get("dtype") is not None else x
    x = x.to(_wide(x))
    for d in dims:
        x = x.prod(d, keepdim=True)
    return (_double(x),)


def _first_largest(sign: int) -> Way:
    """Arg-max or arg-min along one dimension: value and global row, the first of equal values."""

    def combine(a: State, b: State) -> State:
        better = b[0] > a[0] if sign > 0 else b[0] < a[0]
        better = better | (torch.isnan(b[0]) & ~torch.isnan(a[0])) if a[0].is_floating_point() else better
        return torch.where(better, b[0], a[0]), torch.where(better, b[1], a[1])

    def partial(x: torch.Tensor, dims: DimList, args: dict[str, Any]) -> State:
        found = x.max(dims[0], keepdim=True) if sign > 0 else x.min(dims[0], keepdim=True)
        return found.values, found.indices + args["offset"]

    return Way(partial, combine, lambda state, count, args: state[args["pick"]])


SUM = Way(_sum, lambda a, b: (a[0] + b[0],), _same)
MEAN = Way(_sum, lambda a, b: (a[0] + b[0],), lambda s, n, _: s[0] / n)
MAX = Way(lambda x, d, _: with_count(x.amax(d, keepdim=True), x, d), combined(True), _same)
MIN = Way(lambda x, d, _: with_count(x.amin(d, keepdim=True), x, d), combined(False), _same)
ANY = Way(
    lambda x, d, _: ((x != 0).to(torch.uint8).amax(d, keepdim=True),), lambda a, b: (torch.maximum(a[0], b[0]),), _same
)
ALL = Way(
    lambda x, d, _: ((x != 0).to(torch.uint8).amin(d, keepdim=True),), lambda a, b: (torch.minimum(a[0], b[0]),), _same
)
VAR = Way(_moments, _add_moments, _variance)
STD = Way(_moments, _add_moments, lambda s, n, a: _root(_variance(s, n, a)))
PROD = Way(_product, lambda a, b: (a[0] * b[0],), _same)
LOGSUMEXP = Way(
    lambda x, d, _: (
        _double(torch.logsumexp(x.to(_wide(x)) if x.is_floating_point() else x.float(), d, keepdim=True)),
    ),
    lambda a, b: (torch.logaddexp(a[0], b[0]),),
    _same,
)


def _norm_combine(p: float) -> Callable[[State, State], State]:
    if math.isinf(p):
        return combined(p > 0)
    if p == 0:
        return lambda a, b: (a[0] + b[0],)
    return lambda a, b: (torch.linalg.vector_norm(torch.stack((a[0], b[0])), p, 0),)


VAR_MEAN = Way(_moments, _add_moments, lambda s, n, a: s[1] if a["pick"] == 1 else _variance(s, n, a))
STD_MEAN = Way(_moments, _add_moments, lambda s, n, a: s[1] if a["pick"] == 1 else _root(_variance(s, n, a)))

WAYS: dict[str, Way] = {
    "sum": SUM, "mean": MEAN, "amax": MAX, "amin": MIN, "any": ANY, "all": ALL, "var": VAR, "std": STD,
    "prod": PROD, "logsumexp": LOGSUMEXP, "var_mean": VAR_MEAN, "std_mean": STD_MEAN,
}  # fmt: skip


class Reduce(Reduction):
    """One of the reductions of the table above."""

    def __init__(self, value: Value, native: Layout, ctx: Context, way: Way, dims: DimList) -> None:
        super().__init__(value, value.refs(), [native], ctx.whole(value.shape))
        self.way, self.dims = way, dims
        self.args = {**arguments(value), "pick": value.pick}
        self.count = math.prod(native.shape[d] for d in dims)

    def partial(self, tensor: torch.Tensor, box: Box, env: Env) -> State:
        """The reduction of these rows."""
        offset = 0
        for axis, (lo, _) in enumerate(box):
            if self.reads[0].dim_of(axis) == self.dims[0]:
                offset = lo
        return self.way.partial(tensor, self.dims, {**self.args, "offset": offset})

    def combine(self, a: State, b: State) -> State:
        """The reduction of both."""
        return self.way.combine(a, b)

    def finish(self, state: State, env: Env) -> torch.Tensor:
        """The result in the operator's shape and type."""
        return self.way.finish(state, self.count, self.args).reshape(self.out.shape).to(self.value.dtype)


def reduced_dims(value: Value, rank: int) -> tuple[DimList, bool]:
    """The dimensions that a call reduces (all if none are named) and whether they are kept."""
    args = arguments(value)
    dims = args.get("dim")
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        found = list(range(rank))
    else:
        found = [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if rank else []
    return found, bool(args.get("keepdim", False))


def bind_way(value: Value, native: Layout, ctx: Context, way: Way) -> Step:
    """A reduction: combined of parts if all split axes are reduced, row by row if none is."""
    dims, keep = reduced_dims(value, len(native.dims))
    cut = [d for d in (native.dim_of(a) for a in range(native.axes)) if d is not None]
    if any(d in dims for d in cut):
        if not all(d in dims for d in cut) or not native.dims:
            raise NoTileError("some of the split axes are reduced")
        return Reduce(value, native, ctx, way, dims)
    return _rows(value, native, dims, keep)


def _rows(value: Value, native: Layout, dims: DimList, keep: bool) -> Step:
    kept: list[Dim] = []
    for d, dim in enumerate(native.dims):
        if d not in dims:
            kept.append(dim)
        elif keep:
            kept.append(((1, -1),))
    return Step(value, value.refs(), [native], Layout(tuple(kept), native.axes))


@rule(
    ["sum", "mean", "amax", "amin", "any", "all", "var", "std", "prod", "logsumexp", "var_mean", "std_mean"],
    "reduction",
    "partial results of the rows, combined",
)
def bind_reduction(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A reduction over the dimensions it names, or all."""
    name = str(value.target).split(".")[1]
    if name in ("prod", "logsumexp") and value.dtype.is_complex:
        raise NoTileError("complex numbers")
    return bind_way(value, natives[0], ctx, WAYS[name])


@rule(["max.default", "min.default"], "reduction", "the largest of the rows' largest")
def bind_extreme(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """The extreme of all elements."""
    return bind_way(value, natives[0], ctx, MAX if "max" in str(value.target) else MIN)


@rule(["max.dim", "min.dim", "argmax", "argmin"], "reduction", "value and global row, the first of equals")
def bind_arg(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Extremes along one dimension with their places."""
    if arguments(value).get("dim") is None:
        raise NoTileError("the flattened index of an extreme")
    name = str(value.target)
    way = _first_largest(1 if "max" in name else -1)
    dims, _ = reduced_dims(value, len(natives[0].dims))
    native = natives[0]
    if any(native.dim_of(a) in dims and not native.plain(dims[0]) for a in range(native.axes)):
        raise NoTileError("rows of several elements")
    step = bind_way(value, native, ctx, way)
    if isinstance(step, Reduce) and value.pick is None:
        step.args["pick"] = 1
    return step


@rule(["linalg_vector_norm", "norm.Scalar", "norm.ScalarOpt_dim"], "reduction", "norms of the rows, combined")
def bind_norm(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A vector norm of any order."""
    args = arguments(value)
    p = _order(args)
    return bind_way(value, natives[0], ctx, Way(_norm_partial, _norm_combine(p), _same))


@expander(
    [
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
    ]
)
def expand_adaptive(x: Expansion) -> Ref | None:
    """Pooling to one row is a reduction; what else is pooled comes first."""
    largest = "max" in str(x.value.target)
    if largest and x.value.pick == 1:
        return None
    source, size = x.value.args
    shape = list(x.shape(source))
    size = list(size) if isinstance(size, (list, tuple)) else [size]
    first = len(shape) - len(size)
    wanted = list(x.value.shape[first:])
    ones = [first + i for i, n in enumerate(wanted) if n == 1]
    if not ones or (largest and ones[-1] - first >= len(ones)):  # of equal ones, the first is another where rows
        return None  # are pooled before what is outside of them in memory
    middle = [shape[first + i] if n == 1 else n for i, n in enumerate(wanted)]
    if middle != shape[first:]:
        source = x.add("rest", "halo.adaptive", [*shape[:first], *middle], [source, middle, largest])
    if largest:
        return x.add("", "halo.largest", x.value.shape, [source, ones])
    return x.add("", torch.ops.aten.mean.dim, x.value.shape, [source, ones, True])

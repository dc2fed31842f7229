"""Normalization of every kind: moments of all rows, combined as in Chan et al. 1979, then a step row for row.

A norm is taken apart while the graph is lowered: ``halo.moments(x, dims, groups)`` gives mean and biased variance in
wide numbers, ``halo.normalize(x, mean and variance, weight, bias, eps)`` applies them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NoTileError, NotPartitionableError
from monai_memeff.halo.planning.layout import Box, Dim, Layout
from monai_memeff.halo.planning.program import Ref, Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Reduction, State, Step, aligned, arguments
from monai_memeff.halo.planning.rules.moments import mean_var
from monai_memeff.halo.planning.rules.table import Expansion, expander, rule

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class Moments(Reduction):
    """Mean and biased variance over some dimensions of all rows, stacked: (2, N, groups or C, 1, ...) in float64."""

    def __init__(self, value: Value, native: Layout, ctx: Context) -> None:
        self.dims, self.groups = value.args[1], value.args[2]
        super().__init__(value, value.refs(), [native], ctx.whole(value.shape))

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(WIDE.get(x.dtype, x.dtype))
        return x if self.groups is None else x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])

    def partial(self, tensor: torch.Tensor, box: Box, env: Env) -> State:
        """Number of elements, mean and sum of squared deviations."""
        x = self._grouped(tensor)
        count = math.prod(x.shape[d] for d in self.dims)
        mean, var = mean_var(x, self.dims)
        mean, m2 = mean.double(), var.double() * count
        return torch.full((), count, dtype=torch.float64, device=mean.device), mean, m2

    def combine(self, a: State, b: State) -> State:
        """Chan, Golub, LeVeque 1979, equation 2.1."""
        (na, ma, sa), (nb, mb, sb) = a, b
        n, delta = na + nb, mb - ma
        return n, ma + delta * (nb / n), sa + sb + delta * delta * (na * nb / n)

    def finish(self, state: State, env: Env) -> torch.Tensor:
        """Mean and variance."""
        n, mean, m2 = state
        return torch.stack([mean, m2 / n])


class Normalize(Step):
    """(x - mean) / sqrt(var + eps) * weight + bias, as one scale and one shift for every channel."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The rows scaled and shifted."""
        has_weight, has_bias, eps, per_element = self.value.args[-4:]
        x, moments = tensors[0], tensors[1].double()
        rest = list(tensors[2:])
        weight = rest.pop(0) if has_weight else None
        bias = rest.pop(0) if has_bias else None
        mean, var = moments[0], moments[1]
        scale = (var + eps).rsqrt()
        work = WIDE.get(x.dtype, x.dtype)
        if per_element:
            y = torch.addcmul((-mean * scale).to(work), x.to(work), scale.to(work))
            y = y if weight is None else y * weight
            return (y if bias is None else y + bias).to(self.value.dtype)
        channels = self.out.shape[1]
        if mean.dim() > x.dim():  # (N, G, 1, 1, ...) of groups
            repeat = channels // mean.shape[1]
            mean, scale = (t.flatten(1, 2).repeat_interleave(repeat, 1) for t in (mean, scale))
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = scale if weight is None else scale * weight.double().view(shape)
        shift = -mean * scale
        shift = shift if bias is None else shift + bias.double().view(shape)
        return torch.addcmul(shift.to(work), x.to(work), scale.to(work)).to(self.value.dtype)


@rule("halo.moments", "norm", "moments of all rows, combined (Chan et al. 1979)")
def bind_moments(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """The moments of a spread or whole tensor."""
    native, (dims, groups) = natives[0], value.args[1:3]
    for axis in range(native.axes):
        d = native.dim_of(axis)
        if d is None:
            continue
        if d == 1 and groups is not None:
            raise NoTileError("the split axis lies in the channels")
        mixed = d + (1 if groups is not None and d > 1 else 0)
        if mixed not in dims:
            return _along(value, natives, ctx)
    return Moments(value, native, ctx)


class _RowMoments(Step):
    """Moments of dimensions that are not cut."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """Mean and variance of the rows."""
        work = Moments.__new__(Moments)
        work.dims, work.groups = self.value.args[1:3]
        return work.finish(work.partial(tensors[0], box, env), env)


def _along(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    native, (dims, groups) = natives[0], value.args[1:3]
    if groups is not None or any(native.dim_of(a) in dims for a in range(native.axes)):
        raise NoTileError("moments along some of the split axes only")
    kept = tuple(((1, -1),) if d in dims else native.dims[d] for d in range(len(native.dims)))
    return _RowMoments(value, value.refs(), [native], Layout((((2, -1),), *kept), native.axes))


@rule("halo.normalize", "norm", "one scale and one shift, row for row")
def bind_normalize(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """The normalized rows."""
    native = natives[0]
    moments, per_element = natives[1], value.args[-1]
    reads = [native]
    channels = any(native.dim_of(a) == 1 for a in range(native.axes))
    if channels and not (moments.spread and (per_element or len(natives) == 2)):
        raise NoTileError("the split axis lies in the channels")
    if moments.spread:
        inner = aligned(moments.shape[1:], native)
        reads.append(Layout((((2, -1),), *inner.dims), native.axes))
    else:
        reads.append(_sliced_moments(moments, native, ctx))
    reads += [aligned(n.shape, native) if per_element else ctx.whole(n.shape) for n in natives[2:]]
    return Normalize(value, value.refs(), reads, native)


def _sliced_moments(moments: Layout, native: Layout, ctx: Context) -> Layout:
    """Moments are read whole, but where the batch is spread (windows) in the batch's rows."""
    if any(native.dim_of(a) == 0 for a in range(native.axes)) and moments.shape[1] == native.shape[0]:
        dims: list[Dim] = [((n, -1),) for n in moments.shape]
        dims[1] = native.dims[0]
        return Layout(tuple(dims), native.axes)
    return ctx.whole(moments.shape)


def _apply(
    x: Expansion, source: Ref, moments: Ref, weight: Any, bias: Any, eps: float, per_element: bool = False
) -> Ref:
    tensors = [t for t in (weight, bias) if t is not None]
    return x.add(
        "",
        "halo.normalize",
        x.value.shape,
        [source, moments, *tensors, weight is not None, bias is not None, eps, per_element],
    )


def _moments(x: Expansion, source: Ref, dims: Sequence[int], groups: int | None = None) -> Ref:
    shape = list(x.shape(source))
    if groups is not None:
        shape = [shape[0], groups, shape[1] // groups, *shape[2:]]
    kept = [1 if d in dims else n for d, n in enumerate(shape)]
    return x.add("moments", "halo.moments", [2, *kept], [source, list(dims), groups], torch.float64)


def _tracked(x: Expansion, mean: Ref, var: Ref) -> Ref:
    """Running statistics in the form of moments: (2, 1, C, 1, ...)."""
    n = x.shape(mean)[0]
    shape = [2, 1, n, *[1] * (len(x.value.shape) - 2)]
    return x.add("tracked", "halo.tracked", shape, [mean, var], torch.float64)


class Tracked(Step):
    """Running mean and variance stacked as moments."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """(2, 1, C, 1, ...)."""
        return torch.stack([t.double() for t in tensors]).view(self.out.shape)


@rule("halo.tracked", "norm", "running statistics")
def bind_tracked(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A small tensor made of buffers."""
    return Tracked(value, value.refs(), [ctx.whole(n.shape) for n in natives], ctx.whole(value.shape))


class Running(Step):
    """The new content of a running mean or variance: (1 - momentum) * old + momentum * new."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The buffer after this step, of its own type."""
        which, momentum, count = self.value.args[2:]
        moments, old = tensors
        new = moments[which].flatten(2).squeeze(-1).mean(0)
        new = new * (count / (count - 1)) if which and count > 1 else new
        return (old.double() * (1 - momentum) + new * momentum).to(old.dtype)


@rule("halo.running", "norm", "running statistics in training")
def bind_running(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A small tensor."""
    return Running(value, value.refs(), [ctx.whole(n.shape) for n in natives], ctx.whole(value.shape))


def _running(x: Expansion, moments: Ref, old: Ref, which: int, momentum: float, count: int) -> Ref:
    return x.add(f"running{which}", "halo.running", x.shape(old), [moments, old, which, momentum, count], x.dtype(old))


@expander(
    [
        "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit_functional",
        "batch_norm",
        "_native_batch_norm_legit",
        "_batch_norm_with_update_functional",
        "native_batch_norm",
    ]
)
def expand_batch_norm(x: Expansion) -> Ref | None:
    """Batch norm, in training with statistics of all rows of the batch."""
    name = str(x.value.target)
    if x.value.pick not in (None, 0, 3, 4):
        return None
    args: Any = arguments(x.value)
    source, weight, bias, eps = args["input"], args["weight"], args["bias"], args.get("eps", args.get("epsilon"))
    mean, var, momentum = args.get("running_mean"), args.get("running_var"), args.get("momentum")
    training = False if "no_training" in name else args.get("training", args.get("train", True))
    if not training and mean is not None:
        return _apply(x, source, _tracked(x, mean, var), weight, bias, eps)
    shape = x.shape(source)
    dims = [0, *range(2, len(shape))]
    moments = _moments(x, source, dims)
    if x.value.pick in (3, 4):
        count = math.prod(shape[d] for d in dims)
        which = x.value.pick - 3
        return _running(x, moments, (mean, var)[which], which, momentum, count)
    return _apply(x, source, moments, weight, bias, eps)


@expander("instance_norm")
def expand_instance_norm(x: Expansion) -> Ref:
    """Instance norm; tracked statistics of training are entered among the program's mutations."""
    args = arguments(x.value)
    source, weight, bias, eps = args["input"], args["weight"], args["bias"], args["eps"]
    mean, var, momentum = args["running_mean"], args["running_var"], args["momentum"]
    if not args["use_input_stats"]:
        return _apply(x, source, _tracked(x, mean, var), weight, bias, eps)
    shape = x.shape(source)
    moments = _moments(x, source, list(range(2, len(shape))))
    if mean is not None:
        for which, old in enumerate((mean, var)):
            name = x.program.state.get(old.index)
            if name is None:
                raise NotPartitionableError(
                    f"{x.value.where}: instance_norm changes running statistics that are not buffers of the network"
                )
            old = Ref(x.program.mutations.get(name, old.index))  # a layer may be used twice
            new = _running(x, moments, old, which, momentum, math.prod(shape[2:]))
            x.program.mutations[name] = new.index
    return _apply(x, source, moments, weight, bias, eps)


@expander(["group_norm.default", "native_group_norm.default"])
def expand_group_norm(x: Expansion) -> Ref | None:
    """Group norm, affine, half-affine or not."""
    if x.value.pick not in (None, 0):
        return None
    args = arguments(x.value)
    groups = args.get("num_groups", args.get("group"))
    source, weight, bias, eps = args["input"], args["weight"], args["bias"], args["eps"]
    dims = list(range(2, len(x.shape(source)) + 1))
    return _apply(x, source, _moments(x, source, dims, groups), weight, bias, eps)


def spread_norm(x: Expansion, source: Ref, normalized: Sequence[int], weight: Any, bias: Any, eps: float) -> Ref:
    """A layer norm over the last dimensions, as moments and an element-wise affine step."""
    n = len(x.shape(source))
    return _apply(x, source, _moments(x, source, list(range(n - len(normalized), n))), weight, bias, eps, True)

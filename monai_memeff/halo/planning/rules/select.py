"""Slices, selections, concatenations: which rows of which tensor the output rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Dim, Layout, along
from monai_memeff.halo.planning.program import Ref, Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, aligned, arguments, broadcast_layout
from monai_memeff.halo.planning.rules.table import Expansion, expander, rule
from monai_memeff.halo.planning.rules.windowed.padding import refined

aten = torch.ops.aten


def _row_axis(layout: Layout, dim: int) -> int | None:
    """The split axis of a dimension, or None."""
    axes = [a for _, a in layout.dims[dim] if a >= 0]
    return axes[0] if axes else None


class Strided(Step):
    """Rows start, start + step, ... of a dimension; `size` neighbors each (an unfolding) or one that is dropped."""

    def __init__(self, value: Value, source: Layout, out: Layout, axis: int, rows: tuple[int, int, int]) -> None:
        super().__init__(value, value.refs(), [source], out)
        self.axis, (self.start, self.step, self.size) = axis, rows

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The rows from the first to the last that is taken."""
        rows = list(self.same(0, box))
        lo, hi = box[self.axis] if self.out.places[self.axis] is not None else (0, 1)
        first = self.start + lo * self.step
        rows[self.axis] = (first, first + (hi - lo - 1) * self.step + self.size) if hi > lo else (0, 0)
        return (Read(0, tuple(rows)),)

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """Every step-th row."""
        dim = self.reads[0].dim_of(self.axis)
        assert dim is not None
        if len(self.value.shape) > len(self.reads[0].dims):
            return tensors[0].unfold(dim, self.size, self.step)
        if len(self.value.shape) < len(self.reads[0].dims):
            return tensors[0].squeeze(dim)
        return tensors[0][(slice(None),) * dim + (slice(None, None, self.step),)] if self.step > 1 else tensors[0]


def _fit(native: Layout, dim: int, shape: Sequence[int], ctx: Context) -> Layout:
    """The layout in which a tensor is read by an operator that picks rows of one dimension."""
    if not native.spread and ctx.volume(shape):
        native = ctx.default(native.shape)
    return refined(native) if _row_axis(native, dim) is not None and not native.plain(dim) else native


@rule(["slice.Tensor", "narrow.default", "slice_copy.Tensor"], "index", "the rows of the slice")
def bind_slice(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A slice of one dimension."""
    args = arguments(value)
    dim = args["dim"] % len(value.shape)
    source = _fit(natives[0], dim, value.shape, ctx)
    rows, axis = source.shape[dim], _row_axis(source, dim)
    start = args["start"] or 0
    start = min(max(start + rows if start < 0 else start, 0), rows)
    dims = list(source.dims)
    dims[dim] = ((value.shape[dim], -1 if axis is None else axis),)
    out = Layout(tuple(dims), source.axes)
    if axis is None:
        return Step(value, value.refs(), [source], out)
    return Strided(value, source, out, axis, (start, args.get("step") or 1, 1))


@rule(["select.int", "select_copy.int"], "index", "one row")
def bind_select(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """One row of one dimension."""
    dim, index = value.args[1] % len(natives[0].shape), value.args[2]
    source = _fit(natives[0], dim, (), ctx)
    axis = _row_axis(source, dim)
    out = Layout(tuple(f for d, f in enumerate(source.dims) if d != dim), source.axes)
    if axis is None:
        return Step(value, value.refs(), [source], out)
    return Strided(value, source, out, axis, (index % source.shape[dim], 1, 1))


@rule("unfold.default", "index", "overlapping windows of rows")
def bind_unfold(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Windows along one dimension, stacked last."""
    dim, size, step = value.args[1] % len(natives[0].shape), value.args[2], value.args[3]
    source = _fit(natives[0], dim, (), ctx)
    axis = _row_axis(source, dim)
    dims: list[Dim] = [*source.dims, ((size, -1),)]
    dims[dim] = ((value.shape[dim], -1 if axis is None else axis),)
    out = Layout(tuple(dims), source.axes)
    if axis is None:
        return Step(value, value.refs(), [source], out)
    return Strided(value, source, out, axis, (0, step, size))


class Concatenate(Step):
    """Rows of the tensors that lie in the range, one after the other."""

    def __init__(self, value: Value, reads: Sequence[Layout], out: Layout, axis: int, dim: int) -> None:
        super().__init__(value, value.refs(), reads, out)
        self.axis, self.dim = axis, dim
        self.starts = [0]
        for layout in reads:
            self.starts.append(self.starts[-1] + layout.shape[dim])

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The rows of each tensor that lies in the range."""
        found, (lo, hi) = [], box[self.axis]
        for i, layout in enumerate(self.reads):
            a, b = max(lo - self.starts[i], 0), min(hi - self.starts[i], layout.shape[self.dim])
            if a < b:
                rows = list(self.same(i, box))
                rows[self.axis] = (a, b) if layout.places[self.axis] is not None else (0, 1)
                found.append(Read(i, tuple(rows)))
        return tuple(found)

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The rows put together."""
        return torch.cat([t.to(self.value.dtype) for t in tensors], self.dim)


@rule(["cat.default", "concat.default"], "index", "rows of each tensor")
def bind_cat(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A concatenation along any dimension."""
    args = arguments(value)
    dim = args["dim"] % len(value.shape)
    if any(len(n.shape) != len(value.shape) for n in natives):
        raise NoTileError("torch's legacy empty tensors")
    spread = [n for n in natives if n.spread]
    model = max(spread, key=lambda n: n.shape[dim]) if spread else None
    base = model or (ctx.default(value.shape) if ctx.volume(value.shape) else ctx.whole(value.shape))
    axis = _row_axis(base, dim)
    if axis is None:
        dims = list(base.dims)
        reads = []
        for n in natives:
            dims[dim] = ((n.shape[dim], -1),)
            reads.append(Layout(tuple(dims), base.axes))
        dims[dim] = ((value.shape[dim], -1),)
        return Step(value, value.refs(), reads, Layout(tuple(dims), base.axes))
    base = refined(base)
    where = {a: p[0] for a, p in enumerate(base.places) if p is not None}
    reads = [along(n.shape, where, base.axes) for n in natives]
    return Concatenate(value, reads, along(value.shape, where, base.axes), axis, dim)


@expander(["stack.default"])
def expand_stack(x: Expansion) -> Ref:
    """Stacking is concatenating with one more dimension."""
    args = arguments(x.value)
    dim = args["dim"] % len(x.value.shape)
    parts = []
    for i, part in enumerate(args["tensors"]):
        shape = list(x.shape(part))
        shape.insert(dim, 1)
        parts.append(x.add(f"part{i}", aten.view.default, shape, [part, shape], x.dtype(part)))
    return x.add("", aten.cat.default, x.value.shape, [parts, dim])


@expander(
    [
        "split.Tensor",
        "split_with_sizes.default",
        "chunk.default",
        "split.sizes",
        "tensor_split.sections",
        "tensor_split.indices",
    ]
)
def expand_split(x: Expansion) -> Ref | None:
    """One part of a split is a slice."""
    args = arguments(x.value)
    source, dim = args["self"], args["dim"] % len(x.value.shape)
    pick, rows = x.value.pick or 0, x.shape(args["self"])[dim]
    if "split_size" in args and not isinstance(args["split_size"], (list, tuple)):
        start = pick * args["split_size"]
    elif "chunks" in args:
        start = pick * -(-rows // args["chunks"])
    elif "sections" in args:
        big = rows % args["sections"]
        start = pick * (rows // args["sections"]) + min(pick, big)
    elif "indices" in args:
        start = ([0, *args["indices"]])[pick]
    else:
        start = sum((args.get("split_sizes") or args["split_size"])[:pick])
    return x.add("", aten.slice.Tensor, x.value.shape, [source, dim, start, start + x.value.shape[dim]])


@expander("unbind.int")
def expand_unbind(x: Expansion) -> Ref:
    """One part is a row."""
    args = arguments(x.value)
    return x.add("", aten.select.int, x.value.shape, [args["self"], args["dim"], x.value.pick])


@expander(["slice_scatter.default", "select_scatter.default"])
def expand_scatter(x: Expansion) -> Ref | None:
    """Rows replaced by others: what is before, the new rows, what is after."""
    args = arguments(x.value)
    source, new, shape = args["self"], args["src"], x.value.shape
    dim = args["dim"] % len(shape)
    rows = shape[dim]
    if "index" in args:
        start = args["index"] % rows
        stop = start + 1
        flat = [*shape[:dim], 1, *shape[dim + 1 :]]
        new = x.add("row", aten.view.default, flat, [new, flat], x.dtype(new))
    else:
        if (args["step"] or 1) != 1:
            return None
        clip = lambda n: min(max(n + rows if n < 0 else n, 0), rows)  # noqa: E731
        start = clip(args["start"] or 0)
        stop = clip(rows if args["end"] is None else min(args["end"], rows))
    if x.dtype(new) != x.value.dtype:
        new = x.add("cast", aten._to_copy.default, x.shape(new), [new], dtype=x.value.dtype, **{})
        x.program[new].kwargs["dtype"] = x.value.dtype
    parts = [new] if stop > start else []
    for name, lo, hi in (("before", 0, start), ("after", max(stop, start), rows)):
        if hi > lo:
            size = [*shape[:dim], hi - lo, *shape[dim + 1 :]]
            part = x.add(name, aten.slice.Tensor, size, [source, dim, lo, hi])
            parts = [part, *parts] if name == "before" else [*parts, part]
    if len(parts) == 1:
        return parts[0]
    return x.add("", aten.cat.default, shape, [parts, dim])


@rule(["copy.default"], "pointwise", "the source, broadcast")
def bind_copy(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """The functional form of copying into a tensor."""
    out = broadcast_layout(value.shape, natives, ctx)
    return Copy(value, value.refs(), [aligned(n.shape, out) for n in natives], out)


class Copy(Step):
    """The source in the target's shape and type."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The source's rows."""
        return tensors[1].to(self.value.dtype).expand(self.out.part_shape(box))


__all__: list[Any] = ["bind_cat", "bind_copy", "bind_select", "bind_slice", "bind_unfold"]

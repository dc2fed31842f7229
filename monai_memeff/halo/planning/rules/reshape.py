"""Views, permutations, expansions: the split axis followed through a change of shape (Swin's windows too)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Dim, Layout, narrow
from monai_memeff.halo.planning.program import Ref, Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, aligned, broadcast_layout
from monai_memeff.halo.planning.rules.table import Expansion, expander, rule

Piece = tuple[int, int, int, int]  # size, split axis or -1, old dimension, new dimension


def refine(native: Layout, shape: Sequence[int]) -> list[Piece]:
    """The common factors of the old and the new shape, outermost first.

    Raises:
        NoTileError: if the shapes have no common factors, or a split factor would be divided inside.
    """
    old = [(n, a, d) for d, dim in enumerate(native.dims) for n, a in dim if n != 1 or a >= 0]
    new = [(int(n), d) for d, n in enumerate(shape) if n != 1]
    if not new or 0 in native.shape:
        raise NoTileError("a view of at most one element")
    pieces: list[Piece] = []
    i = j = 0
    left_old = left_new = 1
    while i < len(old) or j < len(new):
        if left_old == 1 and i < len(old):
            left_old, axis, source = old[i][0], old[i][1], old[i][2]
            i += 1
            fresh = True
        if left_new == 1 and j < len(new):
            left_new, target = new[j]
            j += 1
        # take the outer common factor
        if left_old == left_new:
            size = left_old
        elif left_old % left_new == 0:
            size = left_new
        elif left_new % left_old == 0:
            size = left_old
        else:
            raise NoTileError("the view mixes rows")
        pieces.append((size, axis if fresh else -1, source, target))
        fresh = False
        left_old //= size
        left_new //= size
    return pieces


class View(Step):
    """The same elements in another shape."""

    def __init__(self, value: Value, source: Layout, out: Layout, units: Sequence[int]) -> None:
        super().__init__(value, value.refs(), [source], out)
        self.units = units  # input rows for each output row

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The rows in the new shape."""
        return tensors[0].reshape(self.out.part_shape(box))

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The rows with the same elements."""
        rows = tuple(
            (lo * u, hi * u) if self.reads[0].places[a] is not None else (0, 1)
            for a, ((lo, hi), u) in enumerate(zip(box, self.units, strict=True))
        )
        return (Read(0, rows),)


_VIEWS = [
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_reshape_alias",
    "view_copy",
    "squeeze_copy",
]


@rule(_VIEWS, "reshape", "the split axis followed through the factors of both shapes")
def bind_view(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A change of shape."""
    if value.dtype.is_complex or "dtype" in str(value.target):
        raise NoTileError("a view of another type")
    native = natives[0]
    if not native.spread or not value.shape:
        return _whole_view(value, native, ctx)
    pieces = refine(native, value.shape)
    dims: list[list[tuple[int, int]]] = [[] for _ in value.shape]
    units = [1] * native.axes
    for size, axis, _, target in pieces:
        dims[target].append((size, axis))
        if axis >= 0:
            rows = native.rows[axis]
            units[axis] = rows // size
    out = Layout(tuple(_merged(d) for d in dims), native.axes)
    found = [a for _, a, _, _ in pieces if a >= 0]
    if len(found) < sum(p is not None for p in native.places):
        raise NoTileError("the split axis has a single row")
    return View(value, native, out, units)


def _merged(factors: Sequence[tuple[int, int]]) -> Dim:
    """Neighbouring factors without an axis as one."""
    found: list[tuple[int, int]] = []
    for n, a in factors:
        if found and a < 0 and found[-1][1] < 0:
            found[-1] = (found[-1][0] * n, -1)
        else:
            found.append((n, a))
    return tuple(found) or ((1, -1),)


def _whole_view(value: Value, native: Layout, ctx: Context) -> Step:
    out = ctx.default(value.shape) if ctx.volume(value.shape) and value.dependent else ctx.whole(value.shape)
    return WholeView(value, value.refs(), [native], out)


class WholeView(Step):
    """A change of shape of a whole tensor, of which rows are taken."""

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The whole tensor."""
        return (Read(0, self.reads[0].whole),)

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The rows of the view."""
        return narrow(tensors[0].reshape(self.value.shape), self.out, self.out.whole, box)


class Permute(Step):
    """Dimensions in another order."""

    order: tuple[int, ...] = ()

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The rows permuted."""
        return tensors[0].permute(self.order)


def _order(value: Value, n: int) -> tuple[int, ...]:
    name = str(value.target).split(".")[1]
    order = list(range(n))
    if name.startswith("permute"):
        return tuple(d % n for d in value.args[1])
    if name in ("t", "t_copy", "numpy_T"):
        return tuple(reversed(order))
    if name.startswith("movedim"):
        old, new = (list(a) if isinstance(a, (list, tuple)) else [a] for a in value.args[1:3])
        old, new = [d % n for d in old], [d % n for d in new]
        rest = [d for d in order if d not in old]
        for target, source in sorted(zip(new, old, strict=True)):
            rest.insert(target, source)
        return tuple(rest)
    a, b = (d % n for d in value.args[1:3])
    order[a], order[b] = order[b], order[a]
    return tuple(order)


@rule(
    [
        "permute.default",
        "transpose.int",
        "t.default",
        "movedim.intlist",
        "movedim.int",
        "permute_copy",
        "transpose_copy",
        "swapaxes",
        "swapdims",
    ],
    "reshape",
    "the split axis moves with its dimension",
)
def bind_permute(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A permutation of the dimensions."""
    native = natives[0]
    order = _order(value, len(native.dims))
    step = Permute(value, value.refs(), [native], Layout(tuple(native.dims[d] for d in order), native.axes))
    step.order = order
    return step


class Expand(Step):
    """Broadcast to the rows' shape."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The rows expanded."""
        return tensors[0].expand(self.out.part_shape(box))


@rule(
    ["expand.default", "expand_copy.default", "broadcast_to.default", "expand_as.default"], "reshape", "one row for all"
)
def bind_expand(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A broadcast; only its first tensor is read."""
    out = broadcast_layout(value.shape, natives[:1], ctx)
    return Expand(value, value.refs()[:1], [aligned(natives[0].shape, out)], out)


@expander("repeat.default")
def expand_repeat(x: Expansion) -> Ref | None:
    """Repeats of single rows are an expansion; others are put together."""
    source, times = x.value.args
    shape = x.shape(source)
    lead = len(times) - len(shape)
    sizes = [1] * lead + list(shape)
    if lead:
        source = x.add("view", torch.ops.aten.view.default, sizes, [source, sizes])
    for d, n in enumerate(times):
        if n == 1:
            continue
        bigger = list(x.shape(source))
        bigger[d] *= n
        if sizes[d] == 1 and n > 0:
            source = x.add(f"expand{d}", torch.ops.aten.expand.default, bigger, [source, bigger])
        elif n > 0:
            source = x.add(f"cat{d}", torch.ops.aten.cat.default, bigger, [[source] * n, d])
        else:
            return None
    return source


__all__: list[str] = ["Permute", "View", "bind_expand", "bind_permute", "bind_view", "expand_repeat", "refine"]

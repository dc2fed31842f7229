"""The largest of all rows, with the gradient of torch where several are equal: shared by all, or the first one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Dim, Layout
from monai_memeff.halo.planning.program import Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Reduction, State, Step
from monai_memeff.halo.planning.rules.table import rule


class _Extreme(torch.autograd.Function):
    """The larger (or smaller) of two, and of how many elements it is the value; they share its gradient."""

    @staticmethod
    def forward(
        ctx: Any, larger: bool, a: torch.Tensor, b: torch.Tensor, na: torch.Tensor, nb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.maximum(a, b) if larger else torch.minimum(a, b)
        na, nb = na * (a == found), nb * (b == found)
        count = na + nb
        ctx.save_for_backward(na, nb)
        ctx.mark_non_differentiable(count)
        return found, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        na, nb = (n.double() for n in ctx.saved_tensors)
        shares = ((n / (na + nb)).to(gradient.dtype) for n in (na, nb))
        return (None, *(gradient * share for share in shares), None, None)


def with_count(found: torch.Tensor, x: torch.Tensor, dims: Sequence[int]) -> State:
    """An extreme of some rows, and how many elements are equal to it where a gradient needs the number."""
    if not x.requires_grad:
        return found, torch.ones(found.shape, dtype=torch.int64, device=found.device)
    return found, (x == found).sum(list(dims), keepdim=True)


def combined(larger: bool) -> Callable[[State, State], State]:
    """The extreme of two sets of rows, from those of each."""

    def combine(a: State, b: State) -> State:
        return _Extreme.apply(larger, a[0], b[0], a[1], b[1])

    return combine


class Largest(Reduction):
    """The largest of all rows; of equal ones the first in memory has the gradient, as in torch's pooling."""

    def __init__(self, value: Value, native: Layout, ctx: Context, dims: Sequence[int]) -> None:
        super().__init__(value, value.refs(), [native], ctx.whole(value.shape))
        self.dims = list(dims)

    def partial(self, tensor: torch.Tensor, box: Box, env: Env) -> State:
        """The largest of these rows, and its place among all."""
        native = self.reads[0]
        start = {d: lo for axis, (lo, _) in enumerate(box) if (d := native.dim_of(axis)) is not None}
        found, place = _largest(tensor, self.dims)
        total, stride = torch.zeros_like(place), 1
        for d in reversed(self.dims):
            total += (place % tensor.shape[d] + start.get(d, 0)) * stride
            place, stride = place // tensor.shape[d], stride * native.shape[d]
        return found, total

    def combine(self, a: State, b: State) -> State:
        """The larger of both, the first of equals."""
        better = (b[0] > a[0]) | ((b[0] == a[0]) & (b[1] < a[1])) | (b[0].isnan() & ~a[0].isnan())
        return torch.where(better, b[0], a[0]), torch.where(better, b[1], a[1])

    def finish(self, state: State, env: Env) -> torch.Tensor:
        """The value alone."""
        return state[0].reshape(self.out.shape)


class LargestRows(Step):
    """The same, where no split axis is reduced."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The largest in every row."""
        return _largest(tensors[0], self.value.args[1])[0].reshape(self.out.part_shape(box))


def _largest(x: torch.Tensor, dims: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and places of the largest over dimensions, in the order of memory; those dimensions are kept."""
    ends = list(range(-len(dims), 0))
    found, place = x.movedim(list(dims), ends).flatten(-len(dims)).max(-1)
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    return found.reshape(shape), place.reshape(shape)


@rule("halo.largest", "reduction", "the largest of the rows' largest, the first of equals")
def bind_largest(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Pooling to one row: combined of parts if all split axes are reduced, row by row if none is."""
    native, dims = natives[0], value.args[1]
    cut = [d for d in (native.dim_of(a) for a in range(native.axes)) if d is not None]
    if any(d in dims for d in cut):
        if not all(d in dims and native.plain(d) for d in cut):
            raise NoTileError("some of the split axes are reduced")
        return Largest(value, native, ctx, dims)
    kept: list[Dim] = [((1, -1),) if d in dims else dim for d, dim in enumerate(native.dims)]
    return LargestRows(value, value.refs(), [native], Layout(tuple(kept), native.axes))

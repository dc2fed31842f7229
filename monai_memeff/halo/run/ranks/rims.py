"""A convolution of this rank's rows while its neighbors' rows are on their way; what those add comes afterwards.

A convolution is linear: the rows of the neighbors (the rims) add to the first and last output rows what their kernel
rows make of them. So no window of own rows and rims is copied together, and messages travel while the large
convolution runs, forward and backward.

    own rows, zeros around them   0 | a b c d | 0        convolved at once
    rims                          r |         | s        convolved with the kernel rows that reach them, and added
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_memeff.halo.planning.layout import Box, length
from monai_memeff.halo.planning.rules.windowed.convolution import DirectConvolution
from monai_memeff.halo.planning.rules.windowed.kernels import convolve
from monai_memeff.halo.planning.rules.windowed.windows import pad_rows
from monai_memeff.halo.run.ranks.comm.exchange import Returning, Transfer, Traveling
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.comm.routes import route
from monai_memeff.halo.run.ranks.placement import Placement

_WIDE = (torch.float32, torch.float64)  # a sum of two results of half precision would be rounded twice


@dataclass(frozen=True)
class Edge:
    """What one rim adds.

    Attributes:
        rows: the rim's rows, in the tensor of both rims, that the kernel reaches: (first, count).
        pads: rows of zeros before and after them under the kernel rows.
        taps: the kernel rows that reach them: (first, count).
        out: the first output row that they add to.
    """

    rows: tuple[int, int]
    pads: tuple[int, int]
    taps: tuple[int, int]
    out: int


@dataclass
class RimConvolution:
    """Output rows of this rank."""

    mesh: HaloMesh
    step: DirectConvolution
    dim: int
    transfer: Transfer
    edges: tuple[Edge, ...]

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        """The convolution."""
        step, flight = self.step, _Flight(self.mesh, self.transfer)
        x, token = _Depart.apply(x, flight)
        y = convolve(x, weight, bias[0] if bias else None, step.stride, step.before, step.dilation, step.groups)
        rims = _Arrive.apply(token, flight)
        return _AddRows.apply(y, self.dim, [e.out for e in self.edges], rims, *self._added(rims, weight))

    def _added(self, rims: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        step, found, i = self.step, [], self.dim - self.step.first
        pads = [0 if j == i else p for j, p in enumerate(step.before)]
        for edge in self.edges:
            rows = pad_rows(rims.narrow(self.dim, *edge.rows), self.dim, *edge.pads)
            kernel = weight.narrow(2 + i, *edge.taps)
            found.append(convolve(rows, kernel, None, step.stride, pads, step.dilation, step.groups))
        return found


class _Flight:
    """The messages of one call, and those of its backward."""

    def __init__(self, mesh: HaloMesh, transfer: Transfer) -> None:
        self.mesh, self.transfer = mesh, transfer
        self.out: Traveling | None = None
        self.back: Returning | None = None


class _Depart(torch.autograd.Function):
    """The rank's rows, of which copies leave for the neighbors; backward adds what comes back, after all else."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flight: _Flight) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.flight = flight
        flight.out = Traveling(flight.mesh.comm, x, flight.transfer)
        return x.view_as(x), x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.flight.back.added_to(gradient), None


class _Arrive(torch.autograd.Function):
    """The neighbors' rows; backward sends their gradients off."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, flight: _Flight) -> torch.Tensor:
        ctx.flight = flight
        assert flight.out is not None
        return flight.out.window()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        flight = ctx.flight
        flight.back = flight.out.returned(gradient)
        return gradient.new_zeros(0), None


class _AddRows(torch.autograd.Function):
    """Adds rows to a result in place; backward needs no copy of it. The rims are tied in for ranks that only send."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, dim: int, starts: Sequence[int], rims: torch.Tensor, *added: torch.Tensor
    ) -> torch.Tensor:
        ctx.dim, ctx.like = dim, (rims.shape, rims.dtype)
        ctx.places = [(start, rows.shape[dim]) for start, rows in zip(starts, added, strict=True)]
        for (start, count), rows in zip(ctx.places, added, strict=True):
            y.narrow(dim, start, count).add_(rows)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape, dtype = ctx.like
        tie = gradient.new_zeros((), dtype=dtype).expand(shape)
        return (gradient, None, None, tie, *[gradient.narrow(ctx.dim, *place) for place in ctx.places])


def rim_convolution(
    mesh: HaloMesh, step: DirectConvolution, native: Placement, boxes: Sequence[Box]
) -> RimConvolution | None:
    """How this rank computes its rows from rims; None if a window is needed. All ranks come to the same answer.

    Args:
        mesh: where the parts live.
        step: the convolution.
        native: how its input is spread.
        boxes: the output rows of every rank, by rank.
    """
    owns = native.boxes()
    if not _suits(step, native) or not all(_aligned(step, own, box) for own, box in zip(owns, boxes, strict=True)):
        return None
    margins = [_margins(step, own, box) for own, box in zip(owns, boxes, strict=True)]
    axes = {axis for found in margins for axis, pair in enumerate(found) if any(pair)}
    if len(axes) != 1:
        return None
    axis, rank = axes.pop(), mesh.comm.rank
    wants = [_rows(own, axis, found[axis]) for own, found in zip(owns, margins, strict=True)]
    found = route(rank, native.shape, native.layout.rows, native.cuts, wants)
    if found.silent:
        return None
    dims = tuple(d for d, _ in filter(None, native.layout.places))
    edges = _edges(step, axis, owns[rank], boxes[rank], margins[rank][axis])
    return RimConvolution(mesh, step, step.sliding[axis], Transfer(dims, found), edges)


def _suits(step: DirectConvolution, native: Placement) -> bool:
    places = [*native.layout.places, *step.out.places]
    return (
        step.value.dtype in _WIDE
        and native.layout == step.reads[0]
        and step.before == step.after
        and None not in places
        and len(step.sliding) == native.layout.axes
        and all(native.layout.plain(d) for d in range(len(native.layout.dims)))
    )


def _aligned(step: DirectConvolution, own: Box, box: Box) -> bool:
    """Whether the convolution of the own rows, with its padding, has exactly the rank's output rows."""
    if not length(own) or not length(box):
        return False
    for axis, d in step.sliding.items():
        i, (low, high) = d - step.first, own[axis]
        reach, n = step.dilation[i] * (step.kernel[i] - 1), high - low + 2 * step.before[i]
        count = (n - reach - 1) // step.stride[i] + 1 if n > reach else 0
        if box[axis][0] * step.stride[i] != low or box[axis][1] - box[axis][0] != count:
            return False
    return True


def _margins(step: DirectConvolution, own: Box, box: Box) -> list[tuple[int, int]]:
    """Rows that the output rows need before and after the own ones, per axis."""
    read = step.needs(box)[0].box
    return [(max(o[0] - r[0], 0), max(r[1] - o[1], 0)) for o, r in zip(own, read, strict=True)]


def _rows(own: Box, axis: int, margin: tuple[int, int]) -> tuple[tuple[tuple[int, int], ...], ...]:
    low, high = own[axis]
    rims = ((low - margin[0], low), (high, high + margin[1]))
    return tuple(rims if a == axis else (rows,) for a, rows in enumerate(own))


def _edges(step: DirectConvolution, axis: int, own: Box, box: Box, margin: tuple[int, int]) -> tuple[Edge, ...]:
    """Rows are counted from the first padded one: the rims end at `pad` and start at `pad + n`."""
    i, outs, n = step.sliding[axis] - step.first, box[axis][1] - box[axis][0], own[axis][1] - own[axis][0]
    stride, dilation, kernel, pad = step.stride[i], step.dilation[i], step.kernel[i], step.before[i]
    before, after = margin
    found = []
    if before:
        last, taps = min(_up(pad, stride), outs), min(_up(pad, dilation), kernel)
        found.append(_edge(0, last, 0, taps, stride, dilation, (pad - before, before, 0)))
    if after:
        first = max(_up(pad + n - dilation * (kernel - 1), stride), 0)
        tap = max(_up(pad + n - (outs - 1) * stride, dilation), 0)
        found.append(_edge(first, outs, tap, kernel, stride, dilation, (pad + n, after, before)))
    return tuple(found)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _edge(first: int, last: int, tap: int, stop: int, stride: int, dilation: int, rim: tuple[int, int, int]) -> Edge:
    """The edge of output rows [first, last) and kernel rows [tap, stop), for a rim of (first row, rows, place)."""
    low, high = first * stride + tap * dilation, (last - 1) * stride + (stop - 1) * dilation + 1
    at, count, place = rim
    begin, end = max(low, at), min(high, at + count)
    return Edge((place + begin - at, end - begin), (begin - low, high - end), (tap, stop - tap), first)

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
from monai_memeff.halo.planning.rules.windowed.kernels import convolve, convolve_backward
from monai_memeff.halo.planning.rules.windowed.windows import pad_rows
from monai_memeff.halo.run.ranks.comm.exchange import Transfer, Traveling
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
        result: torch.Tensor = _Convolve.apply(self, x, weight, bias[0] if bias else None)
        return result

    @property
    def kernel_dim(self) -> int:
        """The kernel's dimension along the split axis."""
        return 2 + self.dim - self.step.first

    def options(self, edge: Edge | None = None) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups for the own rows or for a rim's."""
        pads = [0 if edge and j == self.kernel_dim - 2 else p for j, p in enumerate(self.step.before)]
        return self.step.stride, pads, self.step.dilation, self.step.groups

    def under(self, edge: Edge, rims: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A rim's rows with their padding, and the kernel rows that reach them."""
        rows = pad_rows(rims.narrow(self.dim, *edge.rows), self.dim, *edge.pads)
        return rows, weight.narrow(self.kernel_dim, *edge.taps).contiguous()


class _Convolve(torch.autograd.Function):
    """Own rows while the rims travel, then the rims; backward the other way round."""

    @staticmethod
    def forward(
        ctx: Any, conv: RimConvolution, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        traveling = Traveling(conv.mesh.comm, x, conv.transfer)
        y = convolve(x, weight, bias, *conv.options())
        rims = traveling.window()
        ctx.places = []
        for edge in conv.edges:
            rows, kernel = conv.under(edge, rims, weight)
            added = convolve(rows, kernel, None, *conv.options(edge))
            ctx.places.append((edge.out, added.shape[conv.dim]))
            y.narrow(conv.dim, *ctx.places[-1]).add_(added)
        ctx.conv, ctx.traveling = conv, traveling
        ctx.save_for_backward(x, weight, rims)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        conv, (x, weight, rims) = ctx.conv, ctx.saved_tensors
        _, to_x, to_weight, to_bias = ctx.needs_input_grad
        g_rims, taps = torch.zeros_like(rims), []
        for edge, place in zip(conv.edges, ctx.places, strict=True):
            rows, kernel = conv.under(edge, rims, weight)
            part = gradient.narrow(conv.dim, *place)
            g_rows, g_kernel, _ = convolve_backward(part, rows, kernel, (to_x, to_weight, False), *conv.options(edge))
            taps.append(g_kernel)
            if to_x:
                own = g_rows.narrow(conv.dim, edge.pads[0], edge.rows[1])
                g_rims.narrow(conv.dim, *edge.rows).add_(own)
        returning = ctx.traveling.returned(g_rims) if to_x else None
        gx, g_weight, g_bias = convolve_backward(gradient, x, weight, (to_x, to_weight, to_bias), *conv.options())
        if to_weight:
            for edge, g_kernel in zip(conv.edges, taps, strict=True):
                g_weight.narrow(conv.kernel_dim, *edge.taps).add_(g_kernel)
        return None, returning.added_to(gx) if returning else None, g_weight, g_bias


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
    return tuple(edge for edge in found if edge.rows[1] > 0)  # a dilated kernel may step over all of a rim


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _edge(first: int, last: int, tap: int, stop: int, stride: int, dilation: int, rim: tuple[int, int, int]) -> Edge:
    """The edge of output rows [first, last) and kernel rows [tap, stop), for a rim of (first row, rows, place)."""
    low, high = first * stride + tap * dilation, (last - 1) * stride + (stop - 1) * dilation + 1
    at, count, place = rim
    begin, end = max(low, at), min(high, at + count)
    return Edge((place + begin - at, end - begin), (begin - low, high - end), (tap, stop - tap), first)

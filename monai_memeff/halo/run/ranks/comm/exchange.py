"""The two differentiable steps of the rank executor: rows move between ranks, and partial results meet on all ranks.

Autograd runs nodes of one thread in the reverse order of their creation, so ranks that make these calls in one order
meet in the reverse order in backward; no rank waits for a message that nobody sends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_memeff.halo.run.ranks.comm.routes import Piece, Route, Span
from monai_memeff.halo.run.ranks.comm.transport import Communicator, Message, Pending

Dims = tuple[int, ...]  # the dimension of the tensor that holds each split axis


def redistribute(comm: Communicator, x: torch.Tensor, dims: Dims, route: Route) -> torch.Tensor:
    """Rows of a spread tensor that this rank wants, wherever they are; backward adds their gradients at their owners.

    Args:
        comm: this rank's communicator.
        x: this rank's rows.
        dims: which dimension of `x` holds each split axis.
        route: from `routes.route`, computed alike by every rank.

    Returns:
        The wanted rows in their order; `x` itself if it is all that is wanted and nobody else wants any of it.
    """
    if route.silent and route.identity:
        return x
    return _Redistribute.apply(x, comm, Transfer(dims, route))


def _cutout(x: torch.Tensor, dims: Dims, starts: Sequence[int], rows: Sequence[Span]) -> torch.Tensor:
    for dim, start, (low, high) in zip(dims, starts, rows, strict=True):
        x = x.narrow(dim, start, high - low)
    return x


def _source(x: torch.Tensor, dims: Dims, route: Route, piece: Piece) -> torch.Tensor:
    """View of a piece in the rank's own rows."""
    return _cutout(x, dims, [lo - own for (lo, _), (own, _) in zip(piece.source, route.own, strict=True)], piece.source)


def _target(window: torch.Tensor, dims: Dims, piece: Piece) -> torch.Tensor:
    """View of a piece's place in the window."""
    return _cutout(window, dims, piece.offset, piece.source)


def _packed(views: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pieces for one peer in one contiguous message."""
    if len(views) == 1:
        return views[0].clone(memory_format=torch.contiguous_format)
    return torch.cat([v.reshape(-1) for v in views])


def _unpacked(message: torch.Tensor, views: Sequence[torch.Tensor], add: bool) -> None:
    """Lay a message out on the views it was packed from, in order; `add` sums instead of overwriting."""
    offset, flat = 0, message.view(-1)
    for view in views:
        piece = flat[offset : offset + view.numel()].view(view.shape)
        view.add_(piece) if add else view.copy_(piece)
        offset += view.numel()


def _resized(shape: Sequence[int], dims: Dims, sizes: Sequence[int]) -> list[int]:
    new = list(shape)
    for dim, size in zip(dims, sizes, strict=True):
        new[dim] = size
    return new


def _count(shape: Sequence[int], dims: Dims, pieces: Sequence[Piece]) -> int:
    """Values in the message that holds these pieces."""
    return sum(math.prod(_resized(shape, dims, [h - lo for lo, h in p.source])) for p in pieces)


@dataclass(frozen=True)
class Transfer:
    """A route of the rows of tensors whose split axes lie in dimensions `dims`."""

    dims: Dims
    route: Route


class Returning:
    """Gradients of rows that other ranks were sent, returning to this rank."""

    def __init__(self, transfer: Transfer, flight: Pending, buffers: Sequence[Message]) -> None:
        self._transfer, self._flight, self._buffers = transfer, flight, buffers

    def added_to(self, own: torch.Tensor) -> torch.Tensor:
        """The gradient of the rank's own rows, completed in place."""
        dims, route = self._transfer.dims, self._transfer.route
        self._flight.wait()
        for (_, pieces), (_, message) in zip(route.sends, self._buffers, strict=True):
            _unpacked(message, [_source(own, dims, route, p) for p in pieces], add=True)
        return own


class Traveling:
    """Rows on their way between ranks."""

    def __init__(self, comm: Communicator, x: torch.Tensor, transfer: Transfer) -> None:
        self._comm, self._transfer = comm, transfer
        dims, route = transfer.dims, transfer.route
        self._shape, self._like = x.shape, x.new_empty(0)
        sends = [(peer, _packed([_source(x, dims, route, p) for p in pieces])) for peer, pieces in route.sends]
        self._buffers = [(peer, x.new_empty(_count(x.shape, dims, pieces))) for peer, pieces in route.receives]
        self._flight: Pending | None = comm.exchange(sends, self._buffers)

    def window(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """What the rank wants, the rows of its own among it copied from `x` while the others are on their way."""
        dims, route = self._transfer.dims, self._transfer.route
        window = self._like.new_empty(_resized(self._shape, dims, route.window))
        for dim, n, (before, after) in zip(dims, route.window, route.margins, strict=False):
            window.narrow(dim, 0, before).zero_()
            window.narrow(dim, n - after, after).zero_()
        for piece in route.local if x is not None else ():
            _target(window, dims, piece).copy_(_source(x, dims, route, piece))
        return self.arrived(window)

    def arrived(self, window: torch.Tensor) -> torch.Tensor:
        """The window, with the other ranks' rows in their places."""
        assert self._flight is not None
        self._flight.wait()
        for (_, pieces), (_, message) in zip(self._transfer.route.receives, self._buffers, strict=True):
            _unpacked(message, [_target(window, self._transfer.dims, p) for p in pieces], add=False)
        self._flight, self._buffers = None, []
        return window

    def returned(self, gradient: torch.Tensor) -> Returning:
        """Send a window's gradient to the ranks whose rows they are of."""
        dims, route = self._transfer.dims, self._transfer.route
        sends = [(peer, _packed([_target(gradient, dims, p) for p in pieces])) for peer, pieces in route.receives]
        buffers = [(peer, gradient.new_empty(_count(self._shape, dims, pieces))) for peer, pieces in route.sends]
        return Returning(self._transfer, self._comm.exchange(sends, buffers), buffers)


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator, transfer: Transfer) -> torch.Tensor:
        ctx.transfer, ctx.shape = transfer, x.shape
        ctx.traveling = traveling = Traveling(comm, x, transfer)
        return traveling.arrived(x.view_as(x)) if transfer.route.identity else traveling.window(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        returning = ctx.traveling.returned(gradient)
        own = _own_gradient(gradient, ctx.transfer.dims, ctx.transfer.route, ctx.shape)
        return returning.added_to(own), None, None


def _own_gradient(gradient: torch.Tensor, dims: Dims, route: Route, shape: torch.Size) -> torch.Tensor:
    """Gradient of the rank's own rows by its own window."""
    if len(route.local) == 1 and route.local[0].source == route.own:  # the usual case: own rows and a margin
        return _target(gradient, dims, route.local[0]).clone(memory_format=torch.contiguous_format)
    own = gradient.new_zeros(shape)
    for piece in route.local:
        _source(own, dims, route, piece).add_(_target(gradient, dims, piece))
    return own


def gather_partials(comm: Communicator, partials: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Small tensors of all ranks on every rank, by rank; backward sums each rank's gradients over all that used them.

    Args:
        comm: this rank's communicator.
        partials: this rank's tensors; the same shapes and dtypes on every rank.
    """
    if comm.size == 1:
        return [list(partials)]
    real = [torch.view_as_real(p) if p.is_complex() else p for p in partials]
    gathered, n = _GatherPartials.apply(comm, *real), len(partials)
    back = [
        torch.view_as_complex(t) if p.is_complex() else t
        for t, p in zip(gathered, [*partials] * comm.size, strict=True)
    ]
    return [back[r * n : (r + 1) * n] for r in range(comm.size)]


def _bytes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of several dtypes as one row of bytes, which every backend can gather."""
    return torch.cat([t.detach().contiguous().reshape(-1).view(torch.uint8) for t in tensors])


class _GatherPartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, comm: Communicator, *partials: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.comm = comm
        ctx.like = [(p.shape, p.dtype) for p in partials]
        found = []
        for row in comm.all_gather(_bytes(partials)):
            offset = 0
            for shape, dtype in ctx.like:
                size = shape.numel() * dtype.itemsize
                found.append(row[offset : offset + size].clone().view(dtype).view(shape))
                offset += size
        exact = [t for t in found if not t.is_floating_point()]
        ctx.mark_non_differentiable(*exact)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        comm, n = ctx.comm, len(ctx.like)
        wide = torch.float32 if gradients[0].device.type == "mps" else torch.float64
        floating = [i for i, (_, dtype) in enumerate(ctx.like) if dtype.is_floating_point]
        sizes = [ctx.like[i][0].numel() for i in floating]
        rows = [gradients[r * n + i].reshape(-1).to(wide) for r in range(comm.size) for i in floating]
        total = comm.all_reduce(torch.cat(rows)).view(comm.size, -1)[comm.rank].split(sizes)
        own: list[torch.Tensor | None] = [None] * n
        for i, part in zip(floating, total, strict=True):
            own[i] = part.view(ctx.like[i][0]).to(ctx.like[i][1])
        return (None, *own)


class _SumLoss(torch.autograd.Function):
    """Sum over the ranks whose gradient passes unchanged: every rank then holds the same loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        return comm.all_reduce(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def sum_loss(comm: Communicator, x: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks with identity backward (for the loss, which all ranks compute alike)."""
    return _SumLoss.apply(x, comm)

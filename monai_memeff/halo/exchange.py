"""The halo exchange and its adjoint as autograd functions, on top of the integer plans of `arithmetic`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_memeff.halo.arithmetic import Piece, Plan, Spans
from monai_memeff.halo.transport import Communicator, Pending

Dims = tuple[int, ...]  # split axes as negative dimensions


def cutout(x: torch.Tensor, dims: Dims, box: Spans, origin: Sequence[int]) -> torch.Tensor:
    """View of the rows `box` (global numbers) of a tensor whose first rows are `origin`."""
    for dim, (low, high), start in zip(dims, box, origin, strict=False):
        x = x.narrow(dim, low - start, high - low)
    return x


def _place(x: torch.Tensor, dims: Dims, piece: Piece) -> torch.Tensor:
    """View of the place of a piece in a window."""
    for dim, (low, high), offset in zip(dims, piece.source, piece.offset, strict=False):
        x = x.narrow(dim, offset, high - low)
    return x


def resized(shape: torch.Size, dims: Dims, sizes: Sequence[int]) -> list[int]:
    """A shape with other sizes on the split axes."""
    new = list(shape)
    for dim, size in zip(dims, sizes, strict=False):
        new[dim] = size
    return new


class Flight:
    """One exchange under way, forward (rows to neighbours) or backward (their gradients home).

    Args:
        comm: this rank's communicator.
        dims: split axes.
        plan: the messages.
    """

    def __init__(self, comm: Communicator, dims: Dims, plan: Plan) -> None:
        self.comm, self.dims, self.plan = comm, dims, plan
        self.origin = [low for low, _ in plan.own]
        self._pending: Pending | None = None
        self._to_self: list[torch.Tensor] = []

    def _post(
        self, sends: list[tuple[int, torch.Tensor]], shapes: list[tuple[int, list[int]]], like: torch.Tensor
    ) -> None:
        me = self.comm.rank
        self._to_self = [t for peer, t in sends if peer == me]
        receives = [(peer, like.new_empty(shape)) for peer, shape in shapes if peer != me]
        self._pending = self.comm.exchange([(peer, t) for peer, t in sends if peer != me], receives)

    def _land(self, peers: list[int]) -> list[torch.Tensor]:
        assert self._pending is not None
        arrived, own = iter(self._pending.wait()), iter(self._to_self)
        self._pending = None
        return [next(own) if peer == self.comm.rank else next(arrived) for peer in peers]

    def send_rows(self, x: torch.Tensor) -> None:
        """Post this rank's rows to those who need them, and ask for ours."""
        rows = [cutout(x, self.dims, p.source, self.origin) for p in self.plan.sends]
        sends = [
            (p.peer, r.clone(memory_format=torch.contiguous_format))
            for p, r in zip(self.plan.sends, rows, strict=False)
        ]
        shapes = [(p.peer, resized(x.shape, self.dims, [h - lo for lo, h in p.source])) for p in self.plan.receives]
        self._post(sends, shapes, x)

    def rows(self) -> list[torch.Tensor]:
        """Wait for the pieces, in the plan's order."""
        return self._land([p.peer for p in self.plan.receives])

    def send_gradients(self, gradients: list[torch.Tensor]) -> None:
        """Post gradients of received pieces to their owners, and ask for those of ours."""
        like = gradients[0] if gradients else None
        shapes = self._gradient_shapes
        self._post(
            [(p.peer, g.contiguous()) for p, g in zip(self.plan.receives, gradients, strict=False)],
            [(p.peer, resized(shapes, self.dims, [h - lo for lo, h in p.source])) for p in self.plan.sends],
            like if like is not None else torch.empty(0, dtype=self._dtype, device=self._device),
        )

    def remember(self, x: torch.Tensor) -> None:
        """Note shape, dtype and device for the way back."""
        self._gradient_shapes, self._dtype, self._device = x.shape, x.dtype, x.device

    def add_gradients(self, gradient: torch.Tensor) -> torch.Tensor:
        """Wait for the gradients of rows sent out and add them to the gradient of this rank's rows."""
        for piece, arrived in zip(self.plan.sends, self._land([p.peer for p in self.plan.sends]), strict=False):
            cutout(gradient, self.dims, piece.source, self.origin).add_(arrived)
        return gradient


class _Window(torch.autograd.Function):
    """Own rows and the rows around them in one tensor; backward is the exact adjoint."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flight: Flight, fill: float) -> torch.Tensor:
        ctx.flight = flight
        flight.remember(x)
        flight.send_rows(x)
        plan = flight.plan
        out = x.new_full(resized(x.shape, flight.dims, [h - lo for lo, h in plan.window]), fill)
        if plan.kept is not None:
            _place(out, flight.dims, plan.kept).copy_(cutout(x, flight.dims, plan.kept.source, flight.origin))
        for piece, rows in zip(plan.receives, flight.rows(), strict=False):
            _place(out, flight.dims, piece).copy_(rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        flight, plan = ctx.flight, ctx.flight.plan
        flight.send_gradients([_place(gradient, flight.dims, p) for p in plan.receives])
        own = gradient.new_zeros(flight._gradient_shapes)
        if plan.kept is not None:
            rows = cutout(own, flight.dims, plan.kept.source, flight.origin)
            rows.copy_(_place(gradient, flight.dims, plan.kept))
        return flight.add_gradients(own), None, None


def window(comm: Communicator, dims: Dims, x: torch.Tensor, plan: Plan, fill: float = 0.0) -> torch.Tensor:
    """Gather the rows of `plan.window` around this rank's rows; rows outside the volume hold `fill`.

    Args:
        comm: this rank's communicator.
        dims: split axes as negative dimensions.
        x: this rank's rows.
        plan: from `arithmetic.plan`, the same call on every rank.
        fill: value beyond the volume's border.

    Returns:
        A new tensor (never a view, so in-place activations may follow).
    """
    return _Window.apply(x, Flight(comm, dims, plan), fill)


class _Start(torch.autograd.Function):
    """Post the rows; backward waits for the gradients that come home. The token ties it to `_Finish`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flight: Flight) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.flight = flight
        flight.remember(x)
        flight.send_rows(x)
        return x.view_as(x), x.new_zeros(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _token: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.flight.add_gradients(gradient.contiguous()), None


def strip_boxes(plan: Plan) -> list[tuple[int, bool, Spans]]:
    """The window minus the own rows, as strips: (axis, upper side, box in global rows).

    A strip spans the whole window on the axes before its own and the own rows on the axes after it.
    """
    found = []
    for axis, ((low, high), (w_low, w_high)) in enumerate(zip(plan.own, plan.window, strict=False)):
        for upper, span in ((False, (w_low, low)), (True, (high, w_high))):
            if span[0] < span[1]:
                found.append((axis, upper, (*plan.window[:axis], span, *plan.own[axis + 1 :])))
    return found


def _strip_of(piece: Piece, plan: Plan) -> tuple[int, bool]:
    """Axis and side of the strip in which a piece lies: the last axis on which it is not in the own rows."""
    spans = [
        (w[0] + o, w[0] + o + s[1] - s[0]) for w, o, s in zip(plan.window, piece.offset, piece.source, strict=False)
    ]
    axis = max(
        a for a, (span, own) in enumerate(zip(spans, plan.own, strict=False)) if span[1] <= own[0] or span[0] >= own[1]
    )
    return axis, spans[axis][0] >= plan.own[axis][1]


def _in_strip(strip: torch.Tensor, box: Spans, dims: Dims, plan: Plan, piece: Piece) -> torch.Tensor:
    starts = [w[0] + o - b[0] for w, o, b in zip(plan.window, piece.offset, box, strict=False)]
    for dim, start, (low, high) in zip(dims, starts, piece.source, strict=False):
        strip = strip.narrow(dim, start, high - low)
    return strip


def assemble(shape: torch.Size, dims: Dims, plan: Plan, rows: Sequence[torch.Tensor], like: torch.Tensor) -> list[Any]:
    """Fill the strips of `strip_boxes` from received pieces; rows outside the volume are zero."""
    boxes = strip_boxes(plan)
    strips = [like.new_zeros(resized(shape, dims, [h - lo for lo, h in box])) for _, _, box in boxes]
    index = {(axis, upper): i for i, (axis, upper, _) in enumerate(boxes)}
    for piece, tensor in zip(plan.receives, rows, strict=False):
        i = index[_strip_of(piece, plan)]
        _in_strip(strips[i], boxes[i][2], dims, plan, piece).copy_(tensor)
    return strips


class _Finish(torch.autograd.Function):
    """Wait for the rows and lay them out as strips; backward posts the strips' gradients at once."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, flight: Flight) -> tuple[torch.Tensor, ...]:
        ctx.flight = flight
        return tuple(assemble(flight._gradient_shapes, flight.dims, flight.plan, flight.rows(), token))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        flight, plan = ctx.flight, ctx.flight.plan
        boxes = strip_boxes(plan)
        index = {(axis, upper): i for i, (axis, upper, _) in enumerate(boxes)}
        pieces = []
        for piece in plan.receives:
            i = index[_strip_of(piece, plan)]
            pieces.append(_in_strip(gradients[i], boxes[i][2], flight.dims, plan, piece))
        flight.send_gradients(pieces)
        return torch.zeros(1, dtype=flight._dtype, device=flight._device), None


def start(flight: Flight, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Post an exchange; returns the rows to compute on meanwhile and a token for `finish`."""
    return _Start.apply(x, flight)


def finish(flight: Flight, token: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Wait for the rows of `start`, as strips in the order of `strip_boxes`."""
    return _Finish.apply(token, flight)


class _AllSum(torch.autograd.Function):
    """Sum over the ranks, forward and backward: a value that every rank goes on using locally."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Communicator) -> torch.Tensor:
        ctx.comm = comm
        return comm.all_reduce(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.comm.all_reduce(gradient.clone(memory_format=torch.contiguous_format)), None


def all_sum(comm: Communicator, x: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks whose gradient is summed too (for statistics inside the network)."""
    return _AllSum.apply(x, comm)


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

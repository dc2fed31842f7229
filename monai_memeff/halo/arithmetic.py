"""Integers of partitioning: where a volume is cut, which rows a layer reads, who sends which rows to whom."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

from monai_memeff.geometry import split_axis

Bounds = tuple[int, ...]  # P + 1 rising row numbers: part i owns rows [bounds[i], bounds[i + 1])
Span = tuple[int, int]  # rows [low, high) of one axis, in global row numbers
Spans = tuple[Span, ...]  # one span per split axis; a geometry.Box has all axes


def cut(size: int, parts: int, multiple: int = 1) -> Bounds:
    """Cut an axis into parts that start at multiples of the network's total stride; the last part takes the rest.

    Raises:
        ValueError: if a part would be left without rows, see `monai_memeff.geometry.split_axis`.
    """
    return (0, *(stop for _, stop in split_axis(size, parts, multiple)))


def conv_size(size: int, kernel: int, stride: int, low: int, high: int, dilation: int, ceil: bool = False) -> int:
    """Output rows of a convolution or pooling with `low` and `high` rows of padding."""
    span = size + low + high - dilation * (kernel - 1) - 1
    rows = (span + (stride - 1 if ceil else 0)) // stride + 1
    return rows - 1 if ceil and (rows - 1) * stride >= size + low else rows


def down_bounds(bounds: Bounds, out_size: int, stride: int) -> Bounds:
    """Cuts of the output of a layer with a stride: the first output row that starts at or after each input cut."""
    return (0, *(min(-(-b // stride), out_size) for b in bounds[1:-1]), out_size)


def up_bounds(bounds: Bounds, out_size: int, factor: int) -> Bounds:
    """Cuts of the output of a layer that multiplies the number of rows."""
    return (0, *(min(b * factor, out_size) for b in bounds[1:-1]), out_size)


@dataclass(frozen=True)
class Segment:
    """Rows `source` of a part, which stand at row `offset` of a window; `image` marks a wrapped (circular) copy."""

    part: int
    source: Span
    offset: int
    image: int = 0


def segments(window: Span, bounds: Bounds, periodic: bool = False) -> tuple[Segment, ...]:
    """Split a window by owner; rows outside the volume belong to nobody unless the axis is periodic."""
    size, found = bounds[-1], []
    for image in (-1, 0, 1) if periodic else (0,):
        for part in range(len(bounds) - 1):
            low = max(window[0], bounds[part] + image * size)
            high = min(window[1], bounds[part + 1] + image * size)
            if low < high:
                found.append(Segment(part, (low - image * size, high - image * size), low - window[0], image))
    return tuple(found)


@dataclass(frozen=True)
class Piece:
    """One message: rows `source` of `peer`, to stand at `offset` of the receiver's window."""

    peer: int
    source: Spans
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What one rank sends and receives so that its window is complete.

    Attributes:
        own: the rank's own rows on each split axis.
        window: the rows it needs.
        kept: the part of its own rows that lies in the window, with its offset.
        receives: pieces by sender.
        sends: pieces of `own` by receiver (`offset` is the receiver's business).
    """

    own: Spans
    window: Spans
    kept: Piece | None
    receives: tuple[Piece, ...]
    sends: tuple[Piece, ...]


def coordinates(rank: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major position of a rank on the mesh."""
    position = []
    for n in reversed(shape):
        rank, here = divmod(rank, n)
        position.append(here)
    return tuple(reversed(position))


def rank_at(position: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Rank at a row-major position of the mesh."""
    rank = 0
    for here, n in zip(position, shape, strict=False):
        rank = rank * n + here
    return rank


Windows = tuple[tuple[Span, ...], ...]  # per split axis, one window per part


def _pieces(rank: int, bounds: tuple[Bounds, ...], windows: Windows, periodic: bool) -> list[tuple[bool, Piece]]:
    shape = tuple(len(b) - 1 for b in bounds)
    position = coordinates(rank, shape)
    axes = [segments(w[p], b, periodic) for w, p, b in zip(windows, position, bounds, strict=False)]
    found = []
    for choice in itertools.product(*axes):
        peer = rank_at(tuple(s.part for s in choice), shape)
        mine = peer == rank and not any(s.image for s in choice)
        found.append((mine, Piece(peer, tuple(s.source for s in choice), tuple(s.offset for s in choice))))
    return found


def _suspects(rank: int, bounds: tuple[Bounds, ...], windows: Windows, periodic: bool) -> list[int]:
    """Ranks whose window touches the rows of `rank`."""
    shape = tuple(len(b) - 1 for b in bounds)
    position = coordinates(rank, shape)
    axes = [
        [q for q in range(n) if any(s.part == here for s in segments(w[q], b, periodic))]
        for n, here, w, b in zip(shape, position, windows, bounds, strict=False)
    ]
    return [rank_at(p, shape) for p in itertools.product(*axes)]


@lru_cache(maxsize=4096)
def plan(rank: int, bounds: tuple[Bounds, ...], windows: Windows, periodic: bool = False) -> Plan:
    """Messages of one rank for one exchange; every rank computes the same plan without asking.

    A window wider than the neighbour's part is served by the parts behind it. Corners come as messages of their own,
    so all axes fly at once.
    """
    shape = tuple(len(b) - 1 for b in bounds)
    position = coordinates(rank, shape)
    pieces = _pieces(rank, bounds, windows, periodic)
    sends = [
        Piece(other, piece.source, piece.offset)
        for other in _suspects(rank, bounds, windows, periodic)
        for mine, piece in _pieces(other, bounds, windows, periodic)
        if piece.peer == rank and not mine
    ]
    return Plan(
        own=tuple((b[p], b[p + 1]) for b, p in zip(bounds, position, strict=False)),
        window=tuple(w[p] for w, p in zip(windows, position, strict=False)),
        kept=next((piece for mine, piece in pieces if mine), None),
        receives=tuple(piece for mine, piece in pieces if not mine),
        sends=tuple(sends),
    )

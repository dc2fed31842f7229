"""Who sends which rows to whom: integers that every rank computes alike, without a message.

A tensor's rows lie in disjoint parts along each split axis (`Cuts`); a rank wants the product of row ranges per axis
(`Wants`), which may overlap other ranks' wants, repeat rows (circular padding) or be empty.

        rank 0        rank 1        rank 2            cuts (0, 4, 7, 10)
    | 0  1  2  3 | 4  5  6 | 7  8  9 |
             [ 2  3  4  5  6  7  8 )                  rank 1 wants (2, 9): 2-3 of rank 0, 7-8 of rank 2
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Bounds = tuple[int, ...]  # parts + 1 rising row numbers: part i owns rows [bounds[i], bounds[i + 1])
Cuts = tuple[Bounds | None, ...]  # per split axis; None where every rank holds all rows
Span = tuple[int, int]  # rows [low, high) of one axis
Spans = tuple[Span, ...]  # ranges of one axis that stand behind each other
Wants = tuple[Spans, ...]  # per split axis


def coordinates(rank: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major position of a rank on the mesh."""
    position = []
    for n in reversed(shape):
        rank, here = divmod(rank, n)
        position.append(here)
    return tuple(reversed(position))


def rank_at(position: Sequence[int], shape: Sequence[int]) -> int:
    """Rank at a row-major position of the mesh."""
    rank = 0
    for here, n in zip(position, shape, strict=True):
        rank = rank * n + here
    return rank


@lru_cache(maxsize=4096)
def _segments(spans: Spans, bounds: Bounds | None, here: int) -> tuple[tuple[int, Span, int], ...]:
    """Ranges split by owner: (part, rows, row of the window where they stand)."""
    found, offset = [], 0
    for low, high in spans:
        parts = [(here, (low, high))] if bounds is None else []
        if bounds is not None:
            if low < high and not bounds[0] <= low <= high <= bounds[-1]:
                raise ValueError(f"Rows {low} to {high} were wanted of a tensor that has {bounds[-1]}.")
            parts = [(p, (max(low, a), min(high, b))) for p, (a, b) in enumerate(itertools.pairwise(bounds))]
        found += [(p, rows, offset + rows[0] - low) for p, rows in parts if rows[0] < rows[1]]
        offset += high - low
    return tuple(found)


@dataclass(frozen=True)
class Piece:
    """Rows `source` of `peer` (global numbers, per split axis) that stand at `offset` of the receiver's window."""

    peer: int
    source: tuple[Span, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives so that its window is complete.

    Attributes:
        own: the rank's own rows per split axis.
        window: number of rows of its window per split axis.
        local: pieces copied from its own rows.
        receives: pieces from each peer, in the order in which the peer packs them.
        sends: pieces of `own` for each peer.
        margins: rows of zeros before and after the wanted ones, per split axis.
    """

    own: tuple[Span, ...]
    window: tuple[int, ...]
    local: tuple[Piece, ...]
    receives: tuple[tuple[int, tuple[Piece, ...]], ...]
    sends: tuple[tuple[int, tuple[Piece, ...]], ...]
    margins: tuple[Span, ...] = ()

    def widened(self, margins: tuple[Span, ...]) -> Route:
        """The same messages into a window with rows of zeros around it."""
        before = [b for b, _ in margins]

        def moved(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
            return tuple(
                Piece(p.peer, p.source, tuple(o + b for o, b in zip(p.offset, before, strict=True))) for p in pieces
            )

        window = tuple(n + b + a for n, (b, a) in zip(self.window, margins, strict=True))
        receives = tuple((peer, moved(pieces)) for peer, pieces in self.receives)
        return Route(self.own, window, moved(self.local), receives, self.sends, margins)

    @property
    def silent(self) -> bool:
        """Whether this rank neither sends nor receives."""
        return not self.receives and not self.sends

    @property
    def identity(self) -> bool:
        """Whether the window is the rank's own rows."""
        kept = tuple(h - lo for lo, h in self.own)
        return self.window == kept and (0 in kept or (len(self.local) == 1 and self.local[0].source == self.own))


def own_rows(cuts: Cuts, sizes: Sequence[int], position: Sequence[int]) -> tuple[Span, ...]:
    """The rows that the rank at a position of the mesh holds, per split axis."""
    return tuple((0, n) if b is None else (b[p], b[p + 1]) for b, n, p in zip(cuts, sizes, position, strict=True))


def _pieces(rank: int, shape: tuple[int, ...], cuts: Cuts, wants: Wants) -> list[Piece]:
    position = coordinates(rank, shape)
    axes = [_segments(spans, b, here) for spans, b, here in zip(wants, cuts, position, strict=True)]
    return [
        Piece(rank_at([s[0] for s in chosen], shape), tuple(s[1] for s in chosen), tuple(s[2] for s in chosen))
        for chosen in itertools.product(*axes)
    ]


def _by_peer(pieces: Sequence[tuple[int, Piece]]) -> tuple[tuple[int, tuple[Piece, ...]], ...]:
    peers = sorted({peer for peer, _ in pieces})
    return tuple((peer, tuple(p for q, p in pieces if q == peer)) for peer in peers)


def route(rank: int, shape: tuple[int, ...], sizes: Sequence[int], cuts: Cuts, wants: Sequence[Wants]) -> Route:
    """Messages of one rank for one redistribution.

    Args:
        rank: which rank.
        shape: ranks along each split axis of the mesh.
        sizes: rows of the whole tensor along each split axis.
        cuts: how the tensor's rows are spread.
        wants: what each rank wants, by rank.

    Raises:
        ValueError: if a rank wants rows that the tensor does not have.
    """
    mine = _pieces(rank, shape, cuts, wants[rank])
    sends = [
        (other, piece)
        for other in range(len(wants))
        if other != rank and _touches(rank, other, shape, cuts, wants[other])
        for piece in _pieces(other, shape, cuts, wants[other])
        if piece.peer == rank
    ]
    return Route(
        own=own_rows(cuts, sizes, coordinates(rank, shape)),
        window=tuple(sum(h - lo for lo, h in spans) for spans in wants[rank]),
        local=tuple(p for p in mine if p.peer == rank),
        receives=_by_peer([(p.peer, p) for p in mine if p.peer != rank]),
        sends=_by_peer(sends),
    )


def _touches(rank: int, other: int, shape: tuple[int, ...], cuts: Cuts, wants: Wants) -> bool:
    """Whether another rank's wants can hold rows of this rank."""
    axes = zip(coordinates(rank, shape), coordinates(other, shape), cuts, wants, strict=True)
    return all(
        here == there if b is None else any(lo < b[here + 1] and b[here] < h for lo, h in spans)
        for here, there, b, spans in axes
    )

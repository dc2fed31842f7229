"""Which rows of each tensor of a plan every rank holds, and how rows in one layout reach the ranks that want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from monai_memeff.halo.planning.layout import Box, Layout
from monai_memeff.halo.run.ranks.comm.exchange import redistribute
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.comm.routes import Bounds, Cuts, Route, coordinates, own_rows, route


@dataclass(frozen=True)
class Placement:
    """How a tensor is spread over a mesh.

    Attributes:
        layout: where the split axes lie in it.
        cuts: row numbers of the cuts along each split axis; None where every rank holds all rows.
        shape: ranks along each split axis.
    """

    layout: Layout
    cuts: Cuts
    shape: tuple[int, ...]

    @property
    def spread(self) -> bool:
        """Whether ranks hold different rows."""
        return any(b is not None for b in self.cuts)

    def box(self, rank: int) -> Box:
        """The rows of one rank."""
        return own_rows(self.cuts, self.layout.rows, coordinates(rank, self.shape))

    def boxes(self) -> list[Box]:
        """The rows of every rank, by rank."""
        return [self.box(rank) for rank in range(torch.Size(self.shape).numel())]


def place(layout: Layout, base: Sequence[tuple[Bounds, int]], shape: tuple[int, ...]) -> Placement:
    """Cuts of a tensor at the same fractions of its rows as those of the input volume.

    Args:
        layout: where the split axes lie in the tensor.
        base: per split axis the cuts of the input and its number of rows.
        shape: ranks along each split axis.
    """
    cuts = [
        None if where is None else tuple(cut * rows // size for cut in bounds)
        for where, rows, (bounds, size) in zip(layout.places, layout.rows, base, strict=True)
    ]
    return Placement(layout, tuple(cuts), shape)


@dataclass(frozen=True)
class Move:
    """One rank's side of a redistribution: from the rows it holds to the rows it wants."""

    layout: Layout
    have: Box
    want: Box
    route: Route

    def __call__(self, mesh: HaloMesh, x: torch.Tensor) -> torch.Tensor:
        """The wanted rows, by messages that the other ranks know of too."""
        if self.route.silent and self.route.identity:
            return x
        flat, dims = self.layout.exposed(self.have)
        window = redistribute(mesh.comm, x.reshape(flat), dims, self.route)
        return window.reshape(self.layout.part_shape(self.want))


def move(source: Placement, wants: Sequence[Box], rank: int, margins: tuple[tuple[int, int], ...] = ()) -> Move:
    """How one rank gets the rows it wants, given what all ranks want.

    Args:
        source: how the tensor is spread.
        wants: the rows each rank wants, by rank.
        rank: this rank.
        margins: rows of zeros to put before and after this rank's rows, per split axis.

    Raises:
        ValueError: if a rank wants rows that the tensor does not have.
    """
    spans = [tuple(((lo, hi),) for lo, hi in box) for box in wants]
    found = route(rank, source.shape, source.layout.rows, source.cuts, spans)
    want = wants[rank]
    if margins:
        found = found.widened(margins)
        want = tuple((lo - before, hi + after) for (lo, hi), (before, after) in zip(want, margins, strict=True))
    return Move(source.layout, source.box(rank), want, found)

"""Marks on tensors that are one rank's part of a whole: which whole, and how it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.layout import Layout
from monai_memeff.halo.run.ranks.comm.routes import Cuts, own_rows
from monai_memeff.halo.run.ranks.first_order import first_order

_MARK = "_memeff_part"
_COUNTED = "_memeff_counted"


@dataclass(frozen=True)
class Part:
    """What a tensor on one rank is a part of.

    Attributes:
        shape: shape of the whole.
        dims: dimension of the tensor that holds each split axis of the mesh.
        cuts: row numbers of the cuts along each split axis; None where every rank holds all rows.
        layout: factors of the dimensions where one holds more than a split axis (a flattened volume), None else.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    cuts: Cuts
    layout: Layout | None = None

    @property
    def spread(self) -> bool:
        """Whether ranks hold different rows."""
        return any(b is not None for b in self.cuts)

    def local(self, position: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part at a position of the mesh."""
        if self.layout is not None:
            return self.layout.part_shape(own_rows(self.cuts, self.layout.rows, position))
        sizes = list(self.shape)
        for dim, bounds, here in zip(self.dims, self.cuts, position, strict=True):
            if bounds is not None:
                sizes[dim] = bounds[here + 1] - bounds[here]
        return tuple(sizes)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the whole along each split axis."""
        return tuple(self.shape[d] for d in self.dims) if self.layout is None else self.layout.rows

    def exposed(self, tensor: torch.Tensor, position: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The part at a position with each split axis in a dimension of its own, and those dimensions."""
        if self.layout is None:
            return tensor, self.dims
        sizes, dims = self.layout.exposed(own_rows(self.cuts, self.layout.rows, position))
        return tensor.reshape(sizes), dims


def mark(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The same tensor, marked."""
    setattr(tensor, _MARK, part)
    return tensor


def part_of(tensor: torch.Tensor) -> Part | None:
    """The mark of a tensor, if any; views, casts and copies of a marked tensor have none."""
    return getattr(tensor, _MARK, None)


def _writable(x: torch.Tensor) -> torch.Tensor:
    """The tensor, into which a caller may write unless it is a view of others."""
    return x.view_as(x) if x._is_view() else x.detach()


class _SameOnAllRanks(torch.autograd.Function):
    """An output that every rank holds: a loss must say whether its gradients are going to be averaged or summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counted: list[bool]) -> torch.Tensor:
        ctx.counted = counted
        return _writable(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if not ctx.counted:
            raise NotPartitionableError(
                f"An output of shape {tuple(gradient.shape)} is the same on every rank, so plain gradients would count "
                f"it once per rank; pass it, or the term made of it, through SpatialLoss(...).replicated(term, output)."
            )
        return gradient, None


def same_on_all_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """An output that every rank holds whole; backward refuses it unless `count_once` was called."""
    counted: list[bool] = []
    tensor = _SameOnAllRanks.apply(tensor, counted)
    setattr(tensor, _COUNTED, counted)
    return tensor


class _SameOnSomeRanks(torch.autograd.Function):
    """An output that is cut along some axes of the mesh only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return _writable(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise NotPartitionableError(
            f"An output of shape {tuple(gradient.shape)} is cut along some axes of the mesh and the same along others, "
            "so gradients would count it several times; use a mesh of one axis, or an output of full extent."
        )


def same_on_some_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Such an output, which backward refuses."""
    return _SameOnSomeRanks.apply(tensor)


def count_once(tensor: torch.Tensor) -> None:
    """Say that the loss made of this output is scaled for having been computed on every rank."""
    getattr(tensor, _COUNTED, []).append(True)


def keeping_marks(change: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    """Nested tensors after a change that keeps their rows (a move to a device, say), marked as before."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        part, new = part_of(tensor), change(tensor)
        return new if part is None else mark(new, part)

    return tree_map_only(torch.Tensor, moved, values)

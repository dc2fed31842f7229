"""Marks on tensors that are one rank's part of a whole: which whole, and how it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from monai_memeff.halo.run.ranks.routes import Cuts

_MARK = "_memeff_part"


@dataclass(frozen=True)
class Part:
    """What a tensor on one rank is a part of.

    Attributes:
        shape: shape of the whole.
        dims: dimension of the tensor that holds each split axis of the mesh.
        cuts: row numbers of the cuts along each split axis; None where every rank holds all rows.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    cuts: Cuts

    @property
    def spread(self) -> bool:
        """Whether ranks hold different rows."""
        return any(b is not None for b in self.cuts)

    def local(self, position: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part at a position of the mesh."""
        sizes = list(self.shape)
        for dim, bounds, here in zip(self.dims, self.cuts, position, strict=True):
            if bounds is not None:
                sizes[dim] = bounds[here + 1] - bounds[here]
        return tuple(sizes)


def mark(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The same tensor, marked."""
    setattr(tensor, _MARK, part)
    return tensor


def part_of(tensor: torch.Tensor) -> Part | None:
    """The mark of a tensor, if any; views, casts and copies of a marked tensor have none."""
    return getattr(tensor, _MARK, None)


def keeping_marks(change: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    """Nested tensors after a change that keeps their rows (a move to a device, say), marked as before."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        part, new = part_of(tensor), change(tensor)
        return new if part is None else mark(new, part)

    return tree_map_only(torch.Tensor, moved, values)

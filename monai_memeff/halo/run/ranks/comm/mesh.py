"""Where a volume's parts live: data-parallel groups times split spatial axes, for any transport."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from monai_memeff.halo.run.ranks.comm.routes import Bounds, coordinates
from monai_memeff.halo.run.ranks.comm.transport import Communicator, SingleRank


@dataclass(eq=False)
class HaloMesh:
    """Where a volume's parts live: data-parallel groups times split spatial axes.

    Attributes:
        spatial: number of parts along each split axis.
        axes: which spatial axes are split (0 is the first after batch and channel), one per entry of `spatial`.
        comm: this rank's communicator within its spatial group.
        data: number of data-parallel groups.
        data_rank: this process's group.
        device_mesh: torch's DeviceMesh with dimensions ("data", "spatial"), or None outside torch.distributed.

    Raises:
        ValueError: parts below 1, a negative axis, an axis twice, or not one axis for each entry of `spatial`.

    Examples:
        >>> mesh = init_mesh(spatial=(1, 1), axes=(0, 2))  # (2, 2) under torchrun --nproc_per_node 4
        >>> mesh.size, mesh.position, mesh.slices((9, 8, 6))
        (1, (0, 0), (slice(0, 9, None), slice(0, 8, None), slice(0, 6, None)))
    """

    spatial: tuple[int, ...]
    axes: tuple[int, ...]
    comm: Communicator
    data: int = 1
    data_rank: int = 0
    device_mesh: Any = None

    def __post_init__(self) -> None:
        if len(self.spatial) != len(self.axes) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"Expected one axis per entry of spatial={self.spatial} but got axes={self.axes}.")
        if not self.spatial or min(self.spatial) < 1 or min(self.axes) < 0:
            raise ValueError(f"Expected positive parts and axes but got spatial={self.spatial}, axes={self.axes}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> HaloMesh:
        return self

    @property
    def size(self) -> int:
        """Number of ranks that share one volume."""
        return math.prod(self.spatial)

    @property
    def device(self) -> torch.device:
        """Where tensors must live to travel."""
        cuda = self.device_mesh is not None and self.device_mesh.device_type == "cuda"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    @property
    def position(self) -> tuple[int, ...]:
        """This rank's place along each split axis."""
        return coordinates(self.comm.rank, self.spatial)

    def cuts(self, shape: Sequence[int]) -> tuple[Bounds, ...]:
        """Where `scatter` cuts a volume of a spatial shape, per split axis: parts differ by at most one row.

        Raises:
            ValueError: if the volume lacks a split axis.
        """
        if max(self.axes) >= len(shape):
            raise ValueError(
                f"The mesh splits spatial axes {self.axes} but the volume has spatial shape {tuple(shape)}."
            )
        return tuple(even_cuts(shape[a], n) for a, n in zip(self.axes, self.spatial, strict=True))

    def slices(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """This rank's box of a volume of a spatial shape, as one slice per spatial axis."""
        own = {a: slice(b[p], b[p + 1]) for a, b, p in zip(self.axes, self.cuts(shape), self.position, strict=True)}
        return tuple(own.get(axis, slice(0, n)) for axis, n in enumerate(shape))


def even_cuts(size: int, parts: int) -> Bounds:
    """Row numbers where an axis is cut: parts differ by at most one row, and are empty if there are too few rows."""
    return tuple(size * i // parts for i in range(parts + 1))


def split_axes(spatial: Sequence[int], axes: Sequence[int] | None) -> tuple[int, ...]:
    """Which spatial axes are split: by default the first ones."""
    return tuple(range(len(spatial))) if axes is None else tuple(axes)


def single_rank_mesh(axes: Sequence[int] = (0,)) -> HaloMesh:
    """A mesh of one rank: the same plan and executor, nothing sent."""
    return HaloMesh((1,) * len(axes), tuple(axes), SingleRank())

"""Where a volume's parts live: data-parallel groups times split spatial axes, for any transport."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from monai_memeff.halo.arithmetic import coordinates
from monai_memeff.halo.transport import Communicator, NoCommunicator
from monai_memeff.halo.virtual import Hub, VirtualCommunicator, here


@dataclass(eq=False)
class HaloMesh:
    """Where a volume's parts live: data-parallel groups times split spatial axes.

    Attributes:
        spatial: number of parts along each split axis.
        axes: which spatial axes are split (0 is the first after batch and channel), one per entry of `spatial`.
        data: number of data-parallel groups.
        data_rank: this process's group.
        multiple: rows between possible cuts per split axis; `spatial_partition` raises it to the network's stride.
        device_mesh: torch's DeviceMesh with dimensions ("data", "spatial"), or None for virtual ranks and none.
        spatial_dims: number of spatial axes, set by `spatial_partition`; without it all axes after the second.
    """

    spatial: tuple[int, ...]
    axes: tuple[int, ...]
    data: int = 1
    data_rank: int = 0
    multiple: tuple[int, ...] = ()
    device_mesh: Any = None
    spatial_dims: int | None = None
    _comms: list[Communicator] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if len(self.spatial) != len(self.axes) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"Expected one axis per entry of spatial={self.spatial} but got axes={self.axes}.")
        if not self.spatial or min(self.spatial) < 1 or min(self.axes) < 0:
            raise ValueError(f"Expected positive parts and axes but got spatial={self.spatial}, axes={self.axes}.")
        self.multiple = self.multiple or (1,) * len(self.spatial)

    def __deepcopy__(self, memo: dict[int, Any]) -> HaloMesh:
        return self

    @property
    def size(self) -> int:
        """Number of ranks that share one volume."""
        return math.prod(self.spatial)

    @property
    def comm(self) -> Communicator:
        """This rank's communicator within its spatial group."""
        rank = here()
        return self._comms[rank or 0 if len(self._comms) > 1 else 0]

    @property
    def device(self) -> torch.device:
        """Where tensors must live to travel."""
        cuda = self.device_mesh is not None and self.device_mesh.device_type == "cuda"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    @property
    def position(self) -> tuple[int, ...]:
        """This rank's place along each split axis."""
        return coordinates(self.comm.rank, self.spatial)


def split_axes(spatial: Sequence[int], axes: Sequence[int] | None) -> tuple[int, ...]:
    """Which spatial axes are split: by default the first ones."""
    return tuple(range(len(spatial))) if axes is None else tuple(axes)


def no_mesh(axes: Sequence[int] = (0,)) -> HaloMesh:
    """A mesh of one rank: the same layers, nothing sent."""
    return HaloMesh((1,) * len(axes), tuple(axes), _comms=[NoCommunicator()])


def virtual_mesh(hub: Hub, spatial: Sequence[int], axes: Sequence[int] | None = None) -> HaloMesh:
    """A mesh whose ranks are the threads of `hub`.

    Raises:
        ValueError: if the hub has another number of ranks.
    """
    if hub.size != math.prod(spatial):
        raise ValueError(
            f"spatial={tuple(spatial)} needs {math.prod(spatial)} virtual ranks but the hub has {hub.size}."
        )
    comms: list[Communicator] = [VirtualCommunicator(hub, r) for r in range(hub.size)]
    return HaloMesh(tuple(spatial), split_axes(spatial, axes), _comms=comms)

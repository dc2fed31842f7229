"""The three transports behind one small interface: torch.distributed, virtual ranks in one process, and none.

This is the only file that imports torch.distributed.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from monai_memeff.halo.arithmetic import coordinates
from monai_memeff.halo.virtual import Hub, here

Message = tuple[int, torch.Tensor]  # (peer within the spatial group, contiguous tensor)


class Pending(Protocol):
    """An exchange under way; `wait` returns the received tensors, in the order asked for."""

    def wait(self) -> list[torch.Tensor]: ...


class Communicator(Protocol):
    """What the layers need of a transport; ranks count within one spatial group.

    Attributes:
        rank: this rank's number.
        size: number of ranks that share a volume.
        sent_bytes: payload bytes sent by `exchange` so far.
        messages: messages sent by `exchange` so far.
        reductions: calls of `all_reduce` so far.
    """

    rank: int
    size: int
    sent_bytes: int
    messages: int
    reductions: int

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start sending tensors and filling buffers."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of equal shape from all ranks, by rank."""
        ...


@dataclass
class _Counters:
    rank: int = 0
    size: int = 1
    sent_bytes: int = 0
    messages: int = 0
    reductions: int = 0

    def count(self, sends: Sequence[Message]) -> None:
        self.messages += len(sends)
        self.sent_bytes += sum(t.numel() * t.element_size() for _, t in sends)


class _Done:
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor]:
        return self._tensors


class NoCommunicator(_Counters):
    """One rank that owns the whole volume; messages to itself (circular padding) are copied."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Hand each sent tensor back, in order."""
        return _Done([sent for _, sent in sends][: len(receives)])

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor itself, in a list."""
        return [tensor]


class VirtualCommunicator(_Counters):
    """One of several ranks in one process, see `monai_memeff.halo.virtual.Hub`."""

    def __init__(self, hub: Hub, rank: int) -> None:
        super().__init__(rank, hub.size)
        self._hub = hub
        self._round = 0

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Post tensors into the receivers' mailboxes; `wait` hands the baton on until the answers are there."""
        self.count(sends)
        for peer, tensor in sends:
            self._hub.mail.setdefault((self.rank, peer), deque()).append(tensor)
        return _Mail(self._hub, self.rank, [peer for peer, _ in receives])

    def _rendezvous(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        number, self._round = self._round, self._round + 1
        slots = self._hub.rounds.setdefault(number, [None] * (self.size + 1))
        slots[self.rank] = tensor
        slots[-1] = (slots[-1] or 0) + 1
        self._hub.wait(self.rank, lambda: slots[-1] >= self.size)
        result = list(slots[:-1])
        slots[-1] += 1
        if slots[-1] == 2 * self.size:
            del self._hub.rounds[number]
        return result

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, added in rank order."""
        self.reductions += 1
        return torch.stack(self._rendezvous(tensor)).sum(0)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of all ranks, by rank."""
        return self._rendezvous(tensor)


class _Mail:
    def __init__(self, hub: Hub, rank: int, peers: list[int]) -> None:
        self._hub, self._rank, self._peers = hub, rank, peers

    def wait(self) -> list[torch.Tensor]:
        boxes = [self._hub.mail.setdefault((peer, self._rank), deque()) for peer in self._peers]
        need = {peer: self._peers.count(peer) for peer in self._peers}
        self._hub.wait(self._rank, lambda: all(len(self._hub.mail[p, self._rank]) >= n for p, n in need.items()))
        return [box.popleft() for box in boxes]


class PeerLost(RuntimeError):
    """A rank that shares the volume stopped answering."""


class TorchCommunicator(_Counters):
    """A spatial group of torch.distributed processes (NCCL or gloo)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group
        self._global = [dist.get_global_rank(group, r) for r in range(self.size)]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start all sends and receives at once."""
        self.count(sends)
        ops = [dist.P2POp(dist.isend, t, self._global[p], self._group) for p, t in sends]
        ops += [dist.P2POp(dist.irecv, t, self._global[p], self._group) for p, t in receives]
        peers = sorted({p for p, _ in [*sends, *receives]})
        with _naming(self.rank, f"exchanging halo rows with ranks {peers}"):
            works = dist.batch_isend_irecv(ops) if ops else []
        return _Works(works, [t for _, t in receives], [t for _, t in sends], self.rank, peers)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place."""
        self.reductions += 1
        with _naming(self.rank, "summing statistics over the group"):
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of all ranks, by rank."""
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        with _naming(self.rank, "gathering over the group"):
            dist.all_gather(tensors, tensor.contiguous(), group=self._group)
        return tensors


class _naming:
    """Turns a transport's error into one line that says what was under way."""

    def __init__(self, rank: int, doing: str) -> None:
        self._rank, self._doing = rank, doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            text = str(error).strip().splitlines()
            raise PeerLost(
                f"Spatial rank {self._rank} got no answer while {self._doing}: a process ended, hung past the timeout "
                f"or runs another configuration. Look for the first error in the other ranks' logs. "
                f"Transport: {text[0] if text else kind.__name__}"
            ) from error


class _Works:
    def __init__(
        self, works: list[Any], received: list[torch.Tensor], sent: list[torch.Tensor], rank: int, peers: list[int]
    ) -> None:
        self._works, self._received, self._sent = works, received, sent  # sent tensors must outlive the sending
        self._doing = (rank, f"waiting for halo rows from ranks {peers}")

    def wait(self) -> list[torch.Tensor]:
        with _naming(*self._doing):
            for work in self._works:
                work.wait()
        self._sent = []
        return self._received


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


def _axes(spatial: Sequence[int], axes: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(range(len(spatial))) if axes is None else tuple(axes)


def init_mesh(
    data: int = 1,
    spatial: Sequence[int] = (2,),
    axes: Sequence[int] | None = None,
    device_type: str | None = None,
    timeout: float = 300.0,
) -> HaloMesh:
    """Arrange the processes of torch.distributed as data x spatial; call on every process after `init_process_group`.

    Args:
        data: number of data-parallel groups; -1 takes what `spatial` leaves over.
        spatial: parts along each split axis, e.g. (2,) or (2, 2).
        axes: which spatial axes are split; by default the first ones.
        device_type: "cuda" or "cpu"; by default what the process group's backend wants.
        timeout: seconds after which a silent peer is an error.

    Raises:
        ValueError: if data times spatial is not the number of processes.
        RuntimeError: if torch.distributed is not initialised.
    """
    parts = math.prod(spatial)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("Call torch.distributed.init_process_group() (under torchrun) before init_mesh().")
    world = dist.get_world_size()
    data = world // parts if data == -1 else data
    if data * parts != world or data < 1:
        raise ValueError(
            f"data={data} x spatial={tuple(spatial)} needs {data * parts} processes but {world} are running; "
            f"change --nproc_per_node or the mesh."
        )
    kind = device_type or ("cuda" if "nccl" in str(dist.get_backend()) else "cpu")
    groups = [
        dist.new_group(list(range(d * parts, (d + 1) * parts)), timeout=timedelta(seconds=timeout)) for d in range(data)
    ]
    data_rank = dist.get_rank() // parts
    device_mesh = dist.device_mesh.DeviceMesh(kind, torch.arange(world).view(data, parts), mesh_dim_names=_NAMES)
    comm = TorchCommunicator(groups[data_rank])
    return HaloMesh(tuple(spatial), _axes(spatial, axes), data, data_rank, device_mesh=device_mesh, _comms=[comm])


_NAMES = ("data", "spatial")


def start_processes(device: torch.device) -> None:
    """Initialise torch.distributed from torchrun's environment, once: NCCL for GPUs, gloo for the CPU.

    Raises:
        RuntimeError: if torchrun's environment is missing.
    """
    if not dist.is_available():
        raise RuntimeError("This build of torch has no torch.distributed.")
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise RuntimeError("Start the script with torchrun (torchrun --nproc_per_node N -m monai.bundle run ...).")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


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
    return HaloMesh(tuple(spatial), _axes(spatial, axes), _comms=comms)


def close() -> None:
    """Leave torch.distributed together: nobody tears down the store while another rank still uses it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

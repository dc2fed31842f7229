"""The transport of real processes, over torch.distributed with NCCL or gloo.

This is the only file that imports torch.distributed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from monai_memeff.arguments import numbers_checked
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh, single_rank_mesh, split_axes
from monai_memeff.halo.run.ranks.comm.transport import (
    Communicator,
    Counters,
    Message,
    PeerLostError,
    Pending,
    SingleRank,
)

_NAMES = ("data", "spatial")
_SMALL, _FEW = 2**16, 8
"""Bytes and ranks up to which CPUs tell each other tensors directly: gloo's collectives take three times as long."""
_TOLD = 1  # the tag of such messages; halo rows have 0


class ProcessGroupCommunicator(Counters):
    """A group of torch.distributed processes (NCCL or gloo): a spatial one, or one across the data-parallel groups."""

    def __init__(self, group: dist.ProcessGroup, kind: str = "spatial") -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group, self._kind = group, kind
        self._global = [dist.get_global_rank(group, r) for r in range(self.size)]

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start all sends and receives at once."""
        self.count(sends)
        ops = [dist.P2POp(dist.isend, t, self._global[p], self._group) for p, t in sends]
        ops += [dist.P2POp(dist.irecv, t, self._global[p], self._group) for p, t in receives]
        peers = sorted({p for p, _ in [*sends, *receives]})
        with _Naming(self.rank, f"exchanging halo rows with ranks {peers}", self._kind):
            works = dist.batch_isend_irecv(ops) if ops else []
        return _Works(works, [t for _, t in receives], [t for _, t in sends], self.rank, peers)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place."""
        self.reductions += 1
        with _Naming(self.rank, f"summing over the {self._kind} group", self._kind):
            if self._told_directly(tensor):
                tensor.copy_(torch.stack(self._told(tensor)).sum(0))  # in one order, so alike on all ranks
            else:
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of all ranks, by rank."""
        self.reductions += 1
        with _Naming(self.rank, f"gathering over the {self._kind} group", self._kind):
            if self._told_directly(tensor):
                return self._told(tensor)
            tensors = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(tensors, tensor.contiguous(), group=self._group)
        return tensors

    def _told_directly(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.nbytes <= _SMALL and self.size <= _FEW

    def _told(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of all ranks, by rank, each sent to every other rank."""
        rows = [tensor.clone() if r == self.rank else torch.empty_like(tensor) for r in range(self.size)]
        peers = [r for r in range(self.size) if r != self.rank]
        works = [dist.isend(rows[self.rank], self._global[r], self._group, _TOLD) for r in peers]
        works += [dist.irecv(rows[r], self._global[r], self._group, _TOLD) for r in peers]
        for work in works:
            work.wait()
        return rows


class _Naming:
    """Turns a transport's error into one line that says what was under way."""

    def __init__(self, rank: int, doing: str, kind: str = "spatial") -> None:
        self._rank, self._doing, self._kind = rank, doing, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            text = str(error).strip().splitlines()
            raise PeerLostError(
                f"{self._kind.capitalize()} rank {self._rank} got no answer while {self._doing}: a process ended, hung "
                f"past the timeout or runs another configuration. Look for the first error in the other ranks' logs. "
                f"Transport: {text[0] if text else kind.__name__}"
            ) from error


class _Works:
    def __init__(
        self, works: list[Any], received: list[torch.Tensor], sent: list[torch.Tensor], rank: int, peers: list[int]
    ) -> None:
        self._works, self._received, self._sent = works, received, sent  # sent tensors must outlive the sending
        self._doing = (rank, f"waiting for halo rows from ranks {peers}")

    def wait(self) -> list[torch.Tensor]:
        with _Naming(*self._doing):
            for work in self._works:
                work.wait()
        self._sent = []
        return self._received


@numbers_checked
def init_mesh(
    data: int = 1,
    spatial: Sequence[int] = (2,),
    axes: Sequence[int] | None = None,
    device_type: str | None = None,
    timeout: float = 300.0,
) -> HaloMesh:
    """Arrange the processes of torch.distributed as data x spatial; call on every process after `init_process_group`.

    A mesh of one part (`data=1, spatial=(1,)`) needs no process group.

    Args:
        data: number of data-parallel groups; -1 takes what `spatial` leaves over.
        spatial: parts along each split axis, e.g. (2,) or (2, 2).
        axes: which spatial axes are split; by default the first ones.
        device_type: "cuda" or "cpu"; by default what the process group's backend wants.
        timeout: seconds after which a silent peer is an error.

    Raises:
        ValueError: if data times spatial is not the number of processes.
        RuntimeError: if torch.distributed is not initialized.

    Examples:
        >>> mesh = init_mesh(data=1, spatial=(1,))  # (2,) after init_process_group on two processes
        >>> mesh.size, mesh.data
        (1, 1)
        >>> destroy_mesh()
    """
    parts = math.prod(spatial)
    if not dist.is_available() or not dist.is_initialized():
        if parts == 1 and data in (1, -1):
            return single_rank_mesh(split_axes(spatial, axes))
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
    _first_call(groups[data_rank], kind)
    comm = ProcessGroupCommunicator(groups[data_rank])
    return HaloMesh(tuple(spatial), split_axes(spatial, axes), comm, data, data_rank, device_mesh)


def _first_call(group: dist.ProcessGroup, kind: str) -> None:
    """NCCL wants the first call in a group to be made by all its ranks; an exchange may concern only some of them."""
    dist.barrier(group=group, device_ids=[torch.cuda.current_device()] if kind == "cuda" else None)


def start_processes(device: torch.device) -> None:
    """Initialize torch.distributed from torchrun's environment, once: NCCL for GPUs, gloo for the CPU.

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


def destroy_mesh() -> None:
    """Leave torch.distributed together: nobody tears down the store while another rank still uses it.

    Without a process group it does nothing.

    Examples:
        >>> mesh = init_mesh(spatial=(1,))  # (2,) under torchrun
        >>> destroy_mesh()  # last line of the script, on every process
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_started() -> bool:
    """Whether the processes of this launch know each other."""
    return dist.is_initialized()


def start(backend: str) -> None:
    """Let the processes of this launch meet, by the environment that torchrun gives."""
    dist.init_process_group(backend)


def world_size() -> int:
    """Number of processes; 1 before they know each other."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number; 0 before they know each other."""
    return dist.get_rank() if dist.is_initialized() else 0


def data_communicator(mesh: HaloMesh) -> Communicator:
    """This process's communicator with those that hold the same part in the other data-parallel groups of its mesh."""
    return SingleRank() if mesh.data == 1 else ProcessGroupCommunicator(mesh.device_mesh.get_group("data"), "data")


def broadcast_object(value: Any, mesh: HaloMesh) -> Any:
    """The object of the first process of a spatial group on every process of that group."""
    values, group = [value], mesh.device_mesh.get_group("spatial")
    dist.broadcast_object_list(values, dist.get_global_rank(group, 0), group)
    return values[0]


def broadcast_tensor(tensor: torch.Tensor, mesh: HaloMesh | None = None) -> None:
    """Fill a tensor, in place, with the values of the first process, of all or of a spatial group."""
    group = None if mesh is None else mesh.device_mesh.get_group("spatial")
    dist.broadcast(tensor, 0 if group is None else dist.get_global_rank(group, 0), group)

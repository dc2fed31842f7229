"""Pieces that turn a bundle's single-GPU training into data x spatial parallel training under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch, Trainer, default_prepare_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from monai_memeff.arguments import numbers_checked
from monai_memeff.halo.planning.capture import home
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.run.ranks.agreement import digest
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.comm.process_group import init_mesh, start_processes
from monai_memeff.halo.run.ranks.partition import is_partitioned, spatial_partition, unpartition
from monai_memeff.halo.run.ranks.parts import keeping_marks
from monai_memeff.halo.run.ranks.volume import gather, scatter, with_meta

_ALONE = ("CheckpointSaver", "StatsHandler", "TensorBoardStatsHandler", "TensorBoardImageHandler", "MLFlowHandler")


def local_device() -> torch.device:
    """This process's GPU (torchrun's LOCAL_RANK), or the CPU.

    Examples:
        >>> local_device().type in ("cpu", "cuda")
        True
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@numbers_checked
def init_from_torchrun(data: int = -1, spatial: Sequence[int] = (2,), axes: Sequence[int] | None = None) -> HaloMesh:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs) and arrange them as data x spatial.

    Args:
        data: number of data-parallel groups; -1 takes what `spatial` leaves over.
        spatial: parts along each split axis.
        axes: which spatial axes are split; by default the first ones.

    Raises:
        RuntimeError: if the script was not started by torchrun.
        ValueError: if the mesh does not fit the number of processes.

    Examples:
        >>> # torchrun --nproc_per_node 4 train.py: two volumes at a time, each over two processes
        >>> mesh = init_from_torchrun(data=2, spatial=(2,))  # doctest: +SKIP
        >>> part = scatter(torch.ones(1, 1, 64, 64, 64), mesh)  # doctest: +SKIP
        >>> destroy_mesh()
    """
    start_processes(local_device())
    return init_mesh(data, spatial, axes)


def parallelize(network: nn.Module, mesh: HaloMesh) -> nn.Module:
    """Partition a network over the mesh, in place, and average its gradients with DistributedDataParallel.

    Args:
        network: on this process's device, with a parameter to be trained; its volumes are (B, C, spatial...).
        mesh: from :func:`init_from_torchrun`, or from :func:`init_mesh` within a process group.

    Returns:
        DistributedDataParallel, to be called with the parts that `scatter` gives.

    Raises:
        NotPartitionableError: as :func:`spatial_partition`, which also says what a call refuses.
        ValueError: the network is partitioned already, or the processes have no process group.
        RuntimeError: the network has no parameter to be trained.

    Examples:
        >>> # torchrun --nproc_per_node 2 train.py
        >>> mesh = init_from_torchrun(spatial=(2,))  # doctest: +SKIP
        >>> network = parallelize(VolumeUNet().to(local_device()), mesh)  # doctest: +SKIP
        >>> loss = SpatialLoss(DiceCELoss(to_onehot_y=True, softmax=True), mesh)  # doctest: +SKIP
        >>> loss(network(scatter(image, mesh)), scatter(label, mesh)).backward()  # doctest: +SKIP
    """
    device = home(network)
    ids = [device.index] if device.type == "cuda" else None
    spatial_partition(network, mesh)
    try:
        return DistributedDataParallel(network, device_ids=ids)
    except BaseException:
        unpartition(network)
        raise


def on_rank_zero(handlers: Iterable[Any], mesh: HaloMesh) -> list[Any]:
    """Handlers for this process: those that write files or logs only on the first process of all.

    Args:
        handlers: MONAI's, or any with ``attach``.
        mesh: where the parts live.

    Returns:
        What this process attaches, with a check of the trainer before it.

    Raises:
        NotPartitionableError: when a trainer attaches them that has an ``iteration_update`` of its own.

    Examples:
        >>> from monai.handlers import StatsHandler
        >>> mesh = init_mesh(spatial=(1,))  # (2,) under torchrun
        >>> [type(handler).__name__ for handler in on_rank_zero([StatsHandler()], mesh)][1:]
        ['StatsHandler']
    """
    first = mesh.comm.rank == 0 and mesh.data_rank == 0
    kept = [h for h in handlers if first or not any(kind.__name__ in _ALONE for kind in type(h).__mro__)]
    return [_OwnIteration(), *kept]


class _OwnIteration:
    """Refuses a trainer whose iterations are not MONAI's: they would take this rank's part for the whole volume."""

    def attach(self, engine: Any) -> None:
        update = getattr(engine, "_process_function", None)
        own = getattr(type(engine), "_iteration", None)
        if isinstance(engine, Trainer) and getattr(update, "__func__", update) is not own:
            raise NotPartitionableError(
                f"The trainer has an iteration_update of its own ({type(update).__name__}: clicks, say), which would "
                f"take each part for a whole volume: train this bundle on one device."
            )


class PrepareBatchPartition(PrepareBatch):
    """Hands each rank its part of image and label; all ranks of a spatial group must have loaded the same batch.

    Args:
        mesh: where the parts live.
        prepare_batch: how image and label are taken from the batch; called with ``device=None``.
        network: what the parts are for, to be refused here if it would take a part for a whole volume.

    Raises:
        NotPartitionableError: the network is not partitioned; when called, on every rank, if the ranks have loaded
            different batches.

    Examples:
        >>> batch = dict.fromkeys(("image", "label"), torch.ones(2, 1, 16, 8, 8))
        >>> prepare = PrepareBatchPartition(init_mesh(spatial=(1,)))  # (2,) under torchrun: 8 of the 16 rows
        >>> [part.shape for part in prepare(batch)]
        [torch.Size([2, 1, 16, 8, 8]), torch.Size([2, 1, 16, 8, 8])]
    """

    def __init__(
        self,
        mesh: HaloMesh,
        prepare_batch: Callable[..., Any] = default_prepare_batch,
        network: nn.Module | None = None,
    ) -> None:
        if network is not None and not is_partitioned(getattr(network, "module", network)):
            raise NotPartitionableError(
                f"The network ({type(network).__name__}) is not partitioned and would take each part for a whole "
                f"volume: use parallelize, and in a bundle name the overlay halo after every file that sets network."
            )
        self.mesh, self.prepare_batch = mesh, prepare_batch

    def __call__(
        self,
        batchdata: dict[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Image and label of this rank's part, on the device, which the whole volume never is."""
        batch = self.prepare_batch(batchdata, None, non_blocking, **kwargs)
        _require_same(batch, self.mesh)
        parts = [scatter(t, self.mesh) if isinstance(t, torch.Tensor) and t.dim() > 2 else t for t in batch]
        return keeping_marks(lambda t: t.to(device=device, non_blocking=non_blocking), tuple(parts))


def _require_same(batch: Sequence[Any], mesh: HaloMesh) -> None:
    """Compare a sample of every tensor among the ranks of a spatial group; parts of different volumes fit together."""
    tensors = [t.as_subclass(torch.Tensor).detach() for t in batch if isinstance(t, torch.Tensor)]
    told = [(tuple(t.shape), str(t.dtype), _sample(t)) for t in tensors]
    mine = torch.tensor([digest(told)], dtype=torch.int64).to(mesh.device)
    if len({int(other) for other in mesh.comm.all_gather(mine)}) > 1:
        raise NotPartitionableError(
            "The ranks of a spatial group have loaded different batches, and each would give a part of another volume: "
            "seed them alike and use no DistributedSampler."
        )


def _sample(tensor: torch.Tensor) -> list[Any]:
    """Up to a thousand values from all over a tensor."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // 1000)].tolist()


class GatheredNetwork(nn.Module):
    """A partitioned network that takes and returns whole volumes (or windows), the same on every rank.

    For evaluation: inferers, metrics and handlers need no change. No gradient flows through it.

    Args:
        network: partitioned, also inside DistributedDataParallel.
        mesh: where the parts live.

    Examples:
        >>> mesh = init_mesh(spatial=(1,))  # (2,) under torchrun
        >>> network = spatial_partition(torch.nn.Conv3d(1, 2, 3, padding=1), mesh)
        >>> GatheredNetwork(network, mesh)(torch.ones(1, 1, 9, 8, 8)).shape
        torch.Size([1, 2, 9, 8, 8])
    """

    def __init__(self, network: nn.Module, mesh: HaloMesh) -> None:
        super().__init__()
        self.network, self.mesh = network, mesh

    def forward(self, x: torch.Tensor) -> Any:
        """Cut (B, C, spatial...), run, gather."""
        part = scatter(x.as_subclass(torch.Tensor), self.mesh)
        return with_meta(gather(self.network(part), self.mesh), x)

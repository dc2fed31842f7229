"""The processes of one launch that share HaloTrainer's patch: their mesh, one batch for all, and sums of gradients."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from nnunetv2.run import load_pretrained_weights
from torch import Tensor, nn

from monai_memeff.halo import HaloMesh, init_mesh
from monai_memeff.halo.run.ranks.comm import process_group as processes


def mesh_of_launch(device: torch.device, axis: int, per_patch: int) -> HaloMesh:
    """The mesh of all processes of a torchrun launch (or of nnU-Net's ``-num_gpus``).

    Without such a launch it is a mesh of one, and nothing is started. On the CPU nnU-Net gives every process all cores;
    processes of one machine then wait for each other's threads, so that each takes its share here.

    Args:
        device: Kind of device, of which each process takes its own.
        axis: Spatial axis along which a patch is cut.
        per_patch: Number of processes that share a patch; the others are further data-parallel groups. 0: all of them.

    Raises:
        ValueError: the processes cannot be divided into groups of so many.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if not processes.is_started() and world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(local_device(device))
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        processes.start("nccl" if device.type == "cuda" else "gloo")
    started = processes.world_size()
    parts = started if started == 1 or per_patch == 0 else per_patch
    if started % parts:
        raise ValueError(
            f"{started} processes cannot be divided into groups of {parts} that share a patch (processes_per_patch): "
            f"start a multiple of {parts}."
        )
    return init_mesh(data=started // parts, spatial=(parts,), axes=(axis,))


def local_device(device: torch.device) -> torch.device:
    """This process's own device of a kind."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", processes.process_rank())))


def take_weights_on_the_host() -> None:
    """Let ``-pretrained_weights`` in processes without GPUs read as one process does; nnU-Net wants a GPU each."""
    load_pretrained_weights.dist = SimpleNamespace(is_initialized=lambda: False)


def shared_batch(batch: dict[str, Any] | None, mesh: HaloMesh, device: torch.device) -> dict[str, Any]:
    """The batch of a group's first process on all of them: data, and target (a tensor or several), on the device."""
    if mesh.size == 1:
        assert batch is not None
        return {name: _to(batch[name], device) for name in ("data", "target")}
    described: dict[str, Any] = {}
    if mesh.comm.rank == 0:
        assert batch is not None
        described = {name: _described(batch[name]) for name in ("data", "target")}
    result: dict[str, Any] = {}
    for name, shapes in processes.broadcast_object(described, mesh).items():
        values = batch[name] if batch is not None else None
        many = isinstance(shapes, list)
        listed = shapes if many else [shapes]
        own = [None] * len(listed) if values is None else values if many else [values]
        tensors = [_broadcast(tensor, shape, device, mesh) for tensor, shape in zip(own, listed, strict=True)]
        result[name] = tensors if many else tensors[0]
    return result


def share_weights(network: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    _share(network.state_dict().values())


def share_buffers(network: nn.Module, mesh: HaloMesh) -> None:
    """Give every data-parallel group the first one's buffers, as DDP does before every forward pass."""
    if mesh.data > 1:
        _share(network.buffers())


def _share(tensors: Iterable[Tensor]) -> None:
    if processes.world_size() > 1:
        for tensor in tensors:
            processes.broadcast_tensor(tensor.detach())


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: HaloMesh) -> None:
    """Add the gradients of a group up and average those of groups, in place; one that no process has is left out."""
    if mesh.size * mesh.data == 1:
        return
    groups = processes.data_communicator(mesh)
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    device = wanted[0].device
    used = torch.tensor([float(p.grad is not None) for p in wanted], device=device)
    counts = groups.all_reduce(mesh.comm.all_reduce(used)).tolist()
    chosen = [parameter for parameter, count in zip(wanted, counts, strict=True) if count]
    for parameter in chosen:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in chosen if parameter.grad is not None])
    sums = groups.all_reduce(mesh.comm.all_reduce(flat)).div_(mesh.data)
    for parameter, total in zip(chosen, sums.split([parameter.numel() for parameter in chosen]), strict=True):
        parameter.grad = total.view_as(parameter)


def _to(values: Any, device: torch.device) -> Any:
    if isinstance(values, list):
        return [_to(value, device) for value in values]
    return values.to(device, non_blocking=True)


def _described(values: Any) -> Any:
    return [_described(value) for value in values] if isinstance(values, list) else (tuple(values.shape), values.dtype)


def _broadcast(
    tensor: Tensor | None, described: tuple[Any, torch.dtype], device: torch.device, mesh: HaloMesh
) -> Tensor:
    shape, dtype = described
    kind = torch.uint8 if dtype == torch.bool or dtype == torch.int16 else dtype  # NCCL and gloo know neither
    whole = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
    processes.broadcast_tensor(whole.view(kind) if kind != dtype else whole, mesh)
    return whole

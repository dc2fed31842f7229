"""HaloTrainer's data-parallel groups: what nnU-Net's code for several processes sees of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from monai_memeff.halo import HaloMesh
from monai_memeff.halo.run.ranks.comm import process_group as processes
from monai_memeff.halo.run.ranks.comm.transport import Communicator


@contextlib.contextmanager
def as_processes(mesh: HaloMesh, trainer: type) -> Iterator[None]:
    """Let the code of a trainer and of its bases see the groups in the place of the processes."""
    seen = SimpleNamespace(get_world_size=lambda: mesh.data, get_rank=lambda: mesh.data_rank)
    functions = (value for kind in trainer.__mro__ for value in vars(kind).values() if isinstance(value, FunctionType))
    modules = {id(function.__globals__): function.__globals__ for function in functions}.values()
    found = [(names, name, value) for names in modules for name, value in names.items() if _is_distributed(value)]
    for names, name, _ in found:
        names[name] = seen
    try:
        yield
    finally:
        for names, name, value in found:
            names[name] = value


def _is_distributed(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__ == "torch.distributed"


@contextlib.contextmanager
def dice_over_groups(mesh: HaloMesh) -> Iterator[None]:
    """Let the batch Dice of nnU-Net gather the sums of the groups in the place of the processes'.

    The processes of a group hold the same sums; gathered from all processes, they would count once for each.
    """
    if mesh.data == 1:
        yield
        return
    comm = processes.data_communicator(mesh)
    AllGatherGrad.apply = lambda tensor: _Gathered.apply(tensor, comm)
    try:
        yield
    finally:
        del AllGatherGrad.apply  # what it inherits is found again


class _Gathered(torch.autograd.Function):
    """Tensors of all groups, stacked; their gradients are summed over the groups."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return torch.stack(comm.all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.all_reduce(gradient.clone(memory_format=torch.contiguous_format))[ctx.comm.rank], None


def refuse_batch(configuration: ConfigurationManager, mesh: HaloMesh) -> None:
    """Refuse a batch that stock's DDP cannot divide among as many processes.

    Raises:
        ValueError: fewer samples than groups, or batch Dice and groups with more samples than others.
    """
    batch, groups = configuration.batch_size, mesh.data
    way_out = f"set batch_size in the plans to a multiple of {groups}, or start another number of processes."
    if batch < groups:
        raise ValueError(f"a batch of {batch} cannot be divided among {groups} data-parallel groups: {way_out}")
    if configuration.batch_dice and batch % groups:
        raise ValueError(
            f"batch Dice wants as many samples in each of {groups} data-parallel groups, and the batch has {batch}: "
            f"{way_out}"
        )


def refuse_batch_norm(network: nn.Module, mesh: HaloMesh) -> None:
    """Refuse batch norm in data-parallel groups.

    Raises:
        ValueError: stock takes its statistics over the batches of all processes, and here each group has its own.
    """
    found = [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]
    if mesh.data > 1 and found:
        raise ValueError(
            f"batch norm ({found[0]}) cannot be trained in {mesh.data} data-parallel groups, whose statistics would "
            f"differ: let all processes share a patch (processes_per_patch 0), or use instance norm."
        )

"""What each process of the distributed tests runs: many checks in one launch, results as one JSON line per check."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from monai.losses import DiceCELoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from monai_memeff.halo import (
    NotPartitionableError,
    SpatialLoss,
    destroy_mesh,
    gather,
    init_mesh,
    scatter,
    spatial_partition,
)
from tests.halo.networks import NETWORKS, snippets, unet
from tests.halo.ranks.compare import tensors, weighed


def report(name: str, value: float) -> None:
    """One result, from rank 0."""
    if dist.get_rank() == 0:
        print(json.dumps({"check": name, "value": value}), flush=True)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest error relative to the largest value."""
    return float(((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).detach())


def volume(batch: int, *space: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random image and label on every process."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(batch, 1, *space, dtype=torch.float64, generator=generator)
    return image, (torch.rand(image.shape, generator=generator) > 0.7).double()


def full(gradient: Any) -> torch.Tensor:
    """A gradient that FSDP2 may have spread."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def networks(spatial: tuple[int, ...], space: tuple[int, ...], names: list[str]) -> None:
    """Forward and gradients of several networks under one mesh."""
    mesh = init_mesh(data=1, spatial=spatial)
    for name in names:
        torch.manual_seed(3)
        whole = NETWORKS[name]().double()
        parts = spatial_partition(copy.deepcopy(whole), mesh)
        x, _ = volume(2, *space)
        expected = whole(x)
        weighed(expected).backward()
        got = parts(scatter(x, mesh))
        weighed(got).backward()
        for p in parts.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
        pairs = zip(tensors(expected), tensors(gather(got, mesh)), strict=True)
        report(f"{name} {spatial} forward", max(difference(a, b) for a, b in pairs))
        grads = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        scale = max(float(g.abs().max()) for g in grads.values())
        found = {n: p.grad for n, p in parts.named_parameters()}
        report(f"{name} {spatial} gradients", max(float((g - found[n]).abs().max()) for n, g in grads.items()) / scale)


class Checkpointed(nn.Module):
    """A network whose whole forward is recomputed in backward."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Recompute instead of remember."""
        return checkpoint(self.module, x, use_reentrant=False)


def wrap_fsdp(network: nn.Module) -> nn.Module:
    """FSDP2 on the root."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(network)
    return network


WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], Any, dict[str, Any]]] = {
    "DDP": (DistributedDataParallel, nullcontext, {}),
    "DDP and checkpoint": (lambda n: DistributedDataParallel(Checkpointed(n)), nullcontext, {}),
    "DDP and segments": (DistributedDataParallel, nullcontext, {"checkpoint_segments": 3}),
    "DDP and save_on_cpu": (DistributedDataParallel, torch.autograd.graph.save_on_cpu, {}),
    "FSDP2": (wrap_fsdp, nullcontext, {}),
    "FSDP2 and segments": (wrap_fsdp, nullcontext, {"checkpoint_segments": 3}),
}


def trained(data: int, spatial: tuple[int, ...], space: tuple[int, ...], steps: int = 3) -> None:
    """Steps of data x spatial parallel training in several ways against one process: loss, gradients, parameters."""
    mesh = init_mesh(data=data, spatial=spatial)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    x, y = volume(data, *space)
    torch.manual_seed(3)
    start = unet().double()
    whole = copy.deepcopy(start)
    history = [step(whole, optimizer, lambda n: loss(n(x), y)) for optimizer in [momentum(whole)] for _ in range(steps)]
    mine = slice(mesh.data_rank, mesh.data_rank + 1)
    for name, (wrap, hooks, options) in WAYS.items():
        network = wrap(spatial_partition(copy.deepcopy(start), mesh, **options))
        spatial_loss = SpatialLoss(loss, mesh)

        def value(n: nn.Module, hooks: Any = hooks, spatial_loss: nn.Module = spatial_loss) -> torch.Tensor:
            with hooks():
                return spatial_loss(n(scatter(x[mine], mesh)), scatter(y[mine], mesh))

        optimizer = momentum(network)
        for number, (expected, grads) in enumerate(history):
            got, found = step(network, optimizer, value)
            total = torch.tensor([got], dtype=torch.float64)
            dist.all_reduce(total)
            error = abs(float(total) / dist.get_world_size() - expected)
            clean = {n.replace("module.", ""): g for n, g in found.items()}
            scale = max(float(g.abs().max()) for g in grads.values())
            pairs = [(g, clean[n.replace("module.", "")]) for n, g in grads.items()]
            error = max([error, *(float((a - b).abs().max()) / scale for a, b in pairs)])
            report(f"{name}, step {number}", error)


def momentum(network: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with a state."""
    return torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9)


def step(network: nn.Module, optimizer: torch.optim.Optimizer, value: Callable[[nn.Module], torch.Tensor]) -> Any:
    """One step: loss and gradients."""
    optimizer.zero_grad()
    loss = value(network)
    loss.backward()
    grads = {n: full(p.grad).clone() for n, p in network.named_parameters() if p.grad is not None}
    optimizer.step()
    return float(loss.detach()), grads


def refused() -> None:
    """Bad meshes, volumes and configurations are refused on every rank before the first step."""
    count = 0
    try:
        init_mesh(data=1, spatial=(7,))
    except ValueError as error:
        count += "processes" in str(error)
    mesh = init_mesh(data=1, spatial=(dist.get_world_size(),))
    other = spatial_partition(unet("batch" if dist.get_rank() == 0 else "instance"), mesh)
    try:
        other(scatter(torch.zeros(1, 1, 16, 8, 8), mesh))
    except NotPartitionableError as error:
        count += "ranks differ in network" in str(error)
    whole = torch.randn(1, 1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    box = scatter(whole if dist.get_rank() == 1 else None, mesh, src=1)
    count += torch.equal(box, scatter(whole, mesh))
    spatial_partition(unet(), mesh)(box)
    total = torch.tensor([count])
    dist.all_reduce(total)
    report("refusals missing", 3 * dist.get_world_size() - int(total))


def as_documented() -> None:
    """The script of the how-to on training, line by line, over gloo."""
    (script,) = snippets("halo_training.md")
    image, label = volume(1, 16, 8, 8)
    started = script.replace('dist.init_process_group("nccl")\n', "")
    assert started != script
    names: dict[str, Any] = {"network": unet().double(), "image": image, "label": label}
    exec(started, names)
    assert all(p.grad is not None for p in names["network"].parameters())
    assert not dist.is_initialized()


def main(task: str) -> None:
    """Run one task in this process."""
    torch.set_num_threads(1)
    if "MEMEFF_STORE" in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{os.environ['MEMEFF_STORE']}", rank=rank, world_size=world)
    else:
        dist.init_process_group("gloo")
    if task == "two":
        networks((2,), (20, 8, 8), ["UNet batch", "SegResNet", "DynUNet", "PlainConvUNet"])
        refused()
        as_documented()
    elif task == "four":
        networks((2, 2), (16, 12, 8), ["UNet instance", "PlainConvUNet"])
        networks((4,), (12, 8, 8), ["UNet group"])
        trained(2, (2,), (20, 8, 8))
    elif task == "nodes":
        trained(2, (2,), (20, 8, 8), steps=1)
        report("nodes missing", 2 - int(os.environ["GROUP_WORLD_SIZE"]))
    destroy_mesh()


if __name__ == "__main__":
    main(sys.argv[1])

"""What each process of the distributed tests runs: many checks in one launch, results as one JSON line per check."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from monai.losses import DiceCELoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from monai_memeff.halo import NotPartitionable, SpatialLoss, close, gather, init_mesh, scatter, spatial_partition
from tests.halo.networks import NETWORKS, snippets, unet


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


def reference(network: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: nn.Module) -> tuple[Any, float, dict]:
    """Output, loss and gradients of the whole volume in one process."""
    network.zero_grad()
    output = network(x)
    value = loss(output, y)
    value.backward()
    return output.detach(), float(value), {n: p.grad.clone() for n, p in network.named_parameters()}


def worst(expected: dict, network: nn.Module, factor: float = 1.0) -> float:
    """Largest gradient error over all parameters, relative to the largest gradient."""
    scale = max(float(g.abs().max()) for g in expected.values())
    got = {n.removeprefix("module."): p.grad for n, p in network.named_parameters()}
    full = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in got.items()}
    return max(float((expected[n] - full[n] * factor).abs().max()) for n in expected) / scale


def networks(spatial: tuple[int, ...], space: tuple[int, ...], names: list[str]) -> None:
    """Forward and gradients of several networks under one mesh."""
    mesh = init_mesh(data=1, spatial=spatial)
    for name in names:
        torch.manual_seed(3)
        whole = NETWORKS[name]().double()
        parts = spatial_partition(copy.deepcopy(whole), mesh)
        x, _ = volume(2, *space)
        expected = whole(x)
        first = expected[0] if isinstance(expected, (list, tuple)) else expected
        (first * first.detach().tanh()).sum().backward()
        got = parts(scatter(x, mesh))
        head = got[0] if isinstance(got, (list, tuple)) else got
        (head * head.detach().tanh()).sum().backward()
        for p in parts.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
        report(f"{name} {spatial} forward", difference(first, gather(head, mesh)))
        grads = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        report(f"{name} {spatial} gradients", worst(grads, parts))


class Checkpointed(nn.Module):
    """A network whose whole forward is recomputed in backward."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Recompute instead of remember."""
        return checkpoint(self.module, x, use_reentrant=False)


@contextmanager
def nothing() -> Iterator[None]:
    """No saved-tensor hooks."""
    yield


def trained(data: int, spatial: tuple[int, ...], space: tuple[int, ...]) -> None:
    """Data x spatial parallel training step by DDP, DDP + checkpoint, save_on_cpu and FSDP2 against one process."""
    mesh = init_mesh(data=data, spatial=spatial)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    x, y = volume(data, *space)
    torch.manual_seed(3)
    whole = unet().double()
    _expected, value, grads = reference(whole, x, y, loss)
    mine = slice(mesh.data_rank, mesh.data_rank + 1)

    def wrap_fsdp(network: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        fully_shard(network)
        return network

    ways: dict[str, tuple[Callable[[nn.Module], nn.Module], Any]] = {
        "DDP": (DistributedDataParallel, nothing),
        "DDP and checkpoint": (lambda n: DistributedDataParallel(Checkpointed(n)), nothing),
        "DDP and save_on_cpu": (DistributedDataParallel, torch.autograd.graph.save_on_cpu),
        "FSDP2": (wrap_fsdp, nothing),
    }
    for name, (wrap, hooks) in ways.items():
        torch.manual_seed(3)
        network = wrap(spatial_partition(unet().double(), mesh))
        with hooks():
            output = network(scatter(x[mine], mesh))
            got = SpatialLoss(loss, mesh)(output, scatter(y[mine], mesh))
        got.backward()
        total = got.detach().clone()
        dist.all_reduce(total)
        report(f"{name} loss", abs(float(total) / dist.get_world_size() - value))
        clean = {n.replace("module.", ""): g for n, g in grads.items()}
        params = {n.replace("module.", ""): p for n, p in network.named_parameters()}
        full = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in params.items()}
        scale = max(float(g.abs().max()) for g in clean.values())
        report(f"{name} gradients", max(float((clean[n] - full[n]).abs().max()) for n in clean) / scale)


def refused() -> None:
    """Bad meshes, volumes and configurations are refused on every rank before the first step."""
    count = 0
    try:
        init_mesh(data=1, spatial=(7,))
    except ValueError as error:
        count += "processes" in str(error)
    mesh = init_mesh(data=1, spatial=(dist.get_world_size(),))
    network = spatial_partition(unet(), mesh)
    try:
        scatter(torch.zeros(1, 1, 4, 8, 8), mesh)
    except ValueError as error:
        count += "voxels" in str(error)
    other = spatial_partition(unet("batch" if dist.get_rank() == 0 else "instance"), mesh)
    try:
        other(scatter(torch.zeros(1, 1, 16, 8, 8), mesh))
    except NotPartitionable as error:
        count += "ranks differ" in str(error)
    whole = torch.randn(1, 1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    box = scatter(whole if dist.get_rank() == 1 else None, mesh, src=1)
    count += torch.equal(box, scatter(whole, mesh))
    network(box)
    total = torch.tensor([count])
    dist.all_reduce(total)
    report("refusals missing", 4 * dist.get_world_size() - int(total))


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
        networks(
            (2,), (24, 8, 8), ["UNet instance", "UNet batch", "UNet group", "SegResNet", "DynUNet", "PlainConvUNet"]
        )
        networks((2,), (32, 16, 16), ["BasicUNet deconv", "BasicUNet nontrainable", "BasicUNetPlusPlus"])
        refused()
        as_documented()
    elif task == "three":
        networks((3,), (20, 8, 8), ["UNet instance", "ResidualEncoderUNet"])
        networks((3,), (12, 8, 8), ["AttentionUnet"])
    elif task == "four":
        networks((2, 2), (16, 12, 8), ["UNet instance", "PlainConvUNet"])
        networks((4,), (16, 8, 8), ["UNet group"])
        trained(2, (2,), (20, 8, 8))
    elif task == "nodes":
        trained(2, (2,), (20, 8, 8))
        report("nodes missing", 2 - int(os.environ["GROUP_WORLD_SIZE"]))
    close()


if __name__ == "__main__":
    main(sys.argv[1])

"""Single precision, and autocast to bfloat16: parts differ from the whole by no more than rounding does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from monai_memeff.halo import SpatialLoss, gather, scatter, spatial_partition
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from tests.halo.networks import NETWORKS
from tests.halo.ranks.compare import captured_once, tensors
from tests.halo.ranks.threads import run_ranks

ROUNDING = 2.5  # parts round elsewhere than the whole; a wrong row would be far outside
NAMES = ["UNet instance", "UNet batch", "SegResNet", "PlainConvUNet"]


def flat_gradients(network: nn.Module) -> torch.Tensor:
    """All gradients in one row."""
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def step(network: nn.Module, x: torch.Tensor, low: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output at full resolution and all gradients of a training step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        output = tensors(network(x))[0]
    assert output.dtype == (torch.bfloat16 if low else torch.float32)
    (output.float() * output.detach().float().tanh()).sum().backward()
    return output, flat_gradients(network)


def spread_step(network: nn.Module, x: torch.Tensor, low: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The same in three parts, and the bytes that were sent."""

    def work(mesh: HaloMesh) -> tuple[torch.Tensor, torch.Tensor, int]:
        output, gradients = step(spatial_partition(copy.deepcopy(network), mesh), scatter(x, mesh), low)
        sent = mesh.comm.sent_bytes
        return gather(output, mesh), gradients, sent

    with captured_once():
        results = run_ranks(work, (3,))
    return results[0][0], sum(g for _, g, _ in results), sum(s for *_, s in results)  # type: ignore[return-value]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference."""
    return float((a.float() - b.float()).square().mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_training_in_parts(name: str) -> None:
    torch.manual_seed(2)
    network, x = NETWORKS[name](), torch.randn(1, 1, 28, 8, 16)
    exact = step(copy.deepcopy(network), x, False)
    whole = step(copy.deepcopy(network), x, True)
    *parts, sent = spread_step(network, x, True)
    *alone, sent_single = spread_step(network, x, False)
    assert sent == sent_single / 2  # halo rows and their gradients travel in half precision
    for low, all_in_one, single, spread in zip(parts, whole, exact, alone, strict=True):
        rounding = distance(all_in_one.detach(), single.detach())
        assert rounding > 0
        assert distance(low, single.detach()) < ROUNDING * rounding
        assert distance(low, all_in_one.detach()) < ROUNDING * rounding
        assert distance(spread, single.detach()) < 1e-4 * float(single.detach().square().mean().sqrt())


@pytest.mark.slow
def test_a_scaler_steps_like_the_whole() -> None:
    torch.manual_seed(2)
    network, x, y = NETWORKS["UNet instance"](), torch.randn(1, 1, 16, 8, 8), torch.randn(1, 2, 16, 8, 8)

    def train(model: nn.Module, loss: Any, image: torch.Tensor, target: torch.Tensor, reduce: Any) -> torch.Tensor:
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model(image), target)
            scaler.scale(value).backward()
            reduce(model)
            scaler.step(optimizer)
            scaler.update()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def work(mesh: HaloMesh) -> torch.Tensor:
        def reduce(model: nn.Module) -> None:
            for p in model.parameters():
                mesh.comm.all_reduce(p.grad).div_(mesh.size)

        model = spatial_partition(copy.deepcopy(network), mesh)
        return train(model, SpatialLoss(nn.MSELoss(), mesh), scatter(x, mesh), scatter(y, mesh), reduce)

    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    whole = train(copy.deepcopy(network), nn.MSELoss(), x, y, lambda model: None)
    with captured_once():
        for found in run_ranks(work):
            assert distance(found, whole) < 0.1 * distance(whole, start)

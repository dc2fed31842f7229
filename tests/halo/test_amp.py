"""Single precision, and autocast to bfloat16: parts differ from the whole by no more than rounding does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from monai_memeff.halo import Hub, SpatialPartitionInferer, gather, scatter, spatial_partition, virtual_mesh
from monai_memeff.halo.network import replica
from tests.halo.networks import NETWORKS

ROUNDING = 2.5  # parts round elsewhere than the whole; a wrong row would be far outside
NAMES = ["UNet instance", "UNet batch", "SegResNet", "PlainConvUNet"]


def lowered(on: bool = True) -> torch.autocast:
    """Autocast on the CPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def first(output: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The output at full resolution."""
    return output[0] if isinstance(output, (list, tuple)) else output


def step(network: nn.Module, x: torch.Tensor, low: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and all gradients of a training step, in single precision."""
    with lowered(low):
        output = first(network(x))
    assert output.dtype == (torch.bfloat16 if low else torch.float32)
    (output.float() * output.detach().float().tanh()).sum().backward()
    return output.detach().float(), flat_gradients(network)


def flat_gradients(network: nn.Module) -> torch.Tensor:
    """All gradients in one row."""
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def spread_step(network: nn.Module, x: torch.Tensor, overlap: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The same in three parts, and the bytes that were sent."""
    hub = Hub(3)
    mesh = virtual_mesh(hub, (3,))
    spatial_partition(network, mesh, overlap=overlap)
    ranks = [replica(network, share_buffers=False) for _ in range(3)]

    def work(rank: int) -> tuple[torch.Tensor, int]:
        output, _ = step(ranks[rank], scatter(x, mesh), torch.is_autocast_enabled("cpu"))
        sent = mesh.comm.sent_bytes
        return gather(output, mesh), sent

    results = hub.run(work)
    return results[0][0], flat_gradients(network), sum(sent for _, sent in results)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference."""
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overlap", [False, True], ids=["strict", "overlapped"])
def test_training_in_parts(name: str, overlap: bool) -> None:
    make: Callable[[], nn.Module] = NETWORKS[name]
    torch.manual_seed(2)
    network, x = make(), torch.randn(1, 1, 28, 8, 16)
    exact = step(copy.deepcopy(network), x, False)
    whole = step(copy.deepcopy(network), x, True)
    with lowered():
        *parts, sent = spread_step(copy.deepcopy(network), x, overlap)
    *_, sent_single = spread_step(copy.deepcopy(network), x, overlap)
    assert sent == sent_single / 2  # halo rows and their gradients travel in half precision
    for one, all_in_one, single in zip(parts, whole, exact, strict=True):
        rounding = distance(all_in_one, single)
        assert rounding > 0
        assert distance(one, single) < ROUNDING * rounding
        assert distance(one, all_in_one) < ROUNDING * rounding


@pytest.mark.parametrize("name", NAMES)
def test_training_in_single_precision(name: str) -> None:
    torch.manual_seed(2)
    network, x = NETWORKS[name](), torch.randn(1, 1, 28, 16, 16)
    output, gradients = step(copy.deepcopy(network), x, False)
    parts, in_parts, _ = spread_step(copy.deepcopy(network), x, True)
    torch.testing.assert_close(parts, output, atol=1e-4, rtol=0)
    assert distance(in_parts, gradients) < 1e-4 * float(gradients.square().mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
def test_streamed_inference(name: str) -> None:
    torch.manual_seed(2)
    network, x = NETWORKS[name]().eval(), torch.randn(1, 1, 64, 16, 16)
    with torch.no_grad():
        single = first(network(x))
        with lowered():
            whole = first(network(x)).float()
    moved = {}
    for low in (False, True):
        inferer = SpatialPartitionInferer(4)
        with lowered(low):
            got = first(inferer(x, network))
        assert got.dtype == (torch.bfloat16 if low else torch.float32)
        assert inferer.last_report is not None
        moved[low] = inferer.last_report.moved_bytes
    rounding = distance(whole, single)
    assert distance(got.float(), single) < ROUNDING * rounding
    assert distance(got.float(), whole) < ROUNDING * rounding
    assert moved[True] < 0.75 * moved[False]


def test_two_rows_per_part_in_half_precision() -> None:
    """On some CPUs torch's own weight gradient is garbage there; parts must not meet it where the whole would not."""
    network, x = nn.Sequential(nn.Conv3d(16, 16, 3, padding=1)), torch.randn(1, 16, 6, 6, 8)
    exact = step(copy.deepcopy(network), x, False)[1]
    for _ in range(5):
        rubbish = [torch.full((n,), 1e30) for n in (10**3, 3 * 10**4, 10**5) for _ in range(10)]
        del rubbish
        parts = copy.deepcopy(network)
        with lowered():
            spread_step(parts, x, True)
        assert distance(flat_gradients(parts), exact) < 0.02 * float(exact.square().mean().sqrt())

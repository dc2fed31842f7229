"""What callers do with a partitioned network's outputs and gradients: as with the plain network, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from monai_memeff.halo import NotPartitionableError, SpatialLoss, init_mesh, scatter, spatial_partition
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from tests.halo.ranks.compare import captured_once, distance, gradients, weighed
from tests.halo.ranks.threads import run_ranks


class Outputs(nn.Module):
    """A volume that ends in an activation, another, and one number for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.InstanceNorm3d(2, affine=True), nn.LeakyReLU(0.1))
        self.b = nn.Conv3d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = self.a(x)
        second = self.b(x.expand(-1, 2, -1, -1, -1))
        return first, second, second + 1


torch.manual_seed(0)
NETWORK = Outputs().double()


def made() -> nn.Module:
    """The network with the same weights each time, on every thread."""
    return copy.deepcopy(NETWORK)


def volume() -> torch.Tensor:
    return torch.randn(1, 1, 7, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def zeroed(y: torch.Tensor) -> None:
    y[:, 0] = 0


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda y: y.mul_(2),
    "relu_": lambda y: F.relu(y, inplace=True),
    "item": zeroed,
    "masked_fill_": lambda y: y.masked_fill_(y.detach() < 0, -1.0),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.slow
def test_outputs_may_be_written_into(name: str) -> None:
    def step(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = network(x)
        for output in outputs:
            WRITES[name](output)
        weighed(outputs).backward()
        return gradients(network)

    expected = step(made(), volume())
    with captured_once():
        found = run_ranks(lambda mesh: step(spatial_partition(made(), mesh), scatter(volume(), mesh)), (3,))
    for parameter, gradient in expected.items():
        assert distance(gradient, sum(rank[parameter] for rank in found), 1.0) < 1e-10, parameter


def test_an_output_that_lies_in_the_memory_of_another_is_not_written_into() -> None:
    network = spatial_partition(nn.Sequential(nn.Conv3d(1, 2, 1), Halves()), init_mesh(spatial=(1,)))
    first, _ = network(torch.ones(1, 1, 4, 3, 3))
    with pytest.raises(RuntimeError, match="modified inplace"):
        first.mul_(2)


class Halves(nn.Module):
    """Two views of one result."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :1], x


def penalty(network: nn.Module, mesh: HaloMesh, x: torch.Tensor) -> None:
    """The parameters' gradients of the gradient's square alone: no exchange would see its graph."""
    (g,) = torch.autograd.grad(network(x)[0].sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), list(network.parameters()), allow_unused=True)


def penalized_loss(network: nn.Module, mesh: HaloMesh, x: torch.Tensor) -> None:
    loss = SpatialLoss(nn.MSELoss(), mesh)
    y = x.detach().requires_grad_()
    loss(y, torch.zeros_like(y)).backward(create_graph=True)


@pytest.mark.parametrize("step", [penalty, penalized_loss])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_of_gradients_are_refused(step: Callable[..., None]) -> None:
    def work(mesh: HaloMesh) -> None:
        network, x = spatial_partition(made(), mesh), scatter(volume(), mesh).requires_grad_()
        with pytest.raises(NotPartitionableError, match="create_graph=True"):
            step(network, mesh, x)

    with captured_once():
        run_ranks(work, (2,))


def dual(network: nn.Module, x: torch.Tensor) -> None:
    with forward_ad.dual_level():
        network(forward_ad.make_dual(x, x.clone()))


TRANSFORMS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "grad": lambda n, x: torch.func.grad(lambda t: n(t)[0].sum())(x),
    "vjp": lambda n, x: torch.func.vjp(lambda t: n(t)[0], x),
    "vmap": lambda n, x: torch.vmap(lambda t: n(t)[0])(x[None]),
    "forward mode": dual,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused(name: str) -> None:
    with pytest.raises(NotPartitionableError, match=r"transform of torch\.func"):
        TRANSFORMS[name](spatial_partition(made(), init_mesh(spatial=(1,))), volume())


@pytest.mark.slow
def test_functional_calls_with_tensors_that_were_computed() -> None:
    def step(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        given = {name: p.detach() * scale for name, p in network.named_parameters()}
        weighed(functional_call(network, given, (x,))).backward()
        assert scale.grad is not None
        assert all(isinstance(p, nn.Parameter) for p in network.parameters())
        return scale.grad

    expected = step(made(), volume())
    with captured_once():
        found = run_ranks(lambda mesh: step(spatial_partition(made(), mesh), scatter(volume(), mesh)), (3,))
    assert distance(expected, sum(found)) < 1e-10

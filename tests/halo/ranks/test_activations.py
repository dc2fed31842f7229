"""Activations that work in the memory of a norm's or convolution's result: same gradients, nothing kept twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from monai_memeff.halo import scatter, spatial_partition
from monai_memeff.halo.run.ranks import schedule
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.layers import activations
from tests.halo.ranks.compare import captured_once, worst
from tests.halo.ranks.threads import run_ranks


class Twice(nn.Module):
    """A norm whose result is read by an activation and by another operator, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(4, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return torch.relu(y) + y.square()


class Returned(nn.Module):
    """A norm whose result is an output beside its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(x)
        return nn.functional.leaky_relu(y, 0.2), y


MIDDLES: dict[str, tuple[nn.Module, int]] = {
    "instance, leaky": (nn.Sequential(nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(0.1, inplace=True)), 1),
    "instance, relu": (nn.Sequential(nn.InstanceNorm3d(4), nn.ReLU()), 1),
    "batch, leaky of nothing": (nn.Sequential(nn.BatchNorm3d(4), nn.LeakyReLU(0.0)), 1),
    "group, relu": (nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()), 1),
    "a slope that turns signs": (nn.Sequential(nn.InstanceNorm3d(4), nn.LeakyReLU(-0.3)), 0),
    "convolution, two activations": (nn.Sequential(nn.ReLU(), nn.LeakyReLU(0.1)), 1),
    "read twice": (Twice(), 0),
    "returned too": (Returned(), 0),
}


@pytest.mark.parametrize("name", MIDDLES)
@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.slow
def test_gradients_are_those_of_the_whole(name: str, segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    middle, expected = MIDDLES[name]
    found: list[int] = []

    def counted(program: Any, tasks: Any, *rest: Any) -> None:
        plain(program, tasks, *rest)
        found.append(sum(isinstance(task.run, activations.Activated) for task in tasks))

    plain = activations.activate_in_place
    monkeypatch.setattr(schedule, "activate_in_place", counted)
    torch.manual_seed(2)
    layers = [nn.Conv3d(1, 4, 3, padding=1), copy.deepcopy(middle)]
    network = nn.Sequential(*layers, *([] if name == "returned too" else [nn.Conv3d(4, 1, 3, padding=1)])).double()
    x = torch.randn(2, 1, 9, 5, 4, dtype=torch.float64)
    assert worst(network, [x], (2,), checkpoint_segments=segments) < 1e-10
    assert set(found) == {expected}


def saved_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct memory that autograd keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    found: dict[int, int] = {}

    def seen(t: torch.Tensor) -> torch.Tensor:
        memory = t.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        network(x).sum().backward()
    return sum(found.values())


@pytest.mark.slow
def test_a_part_keeps_no_more_for_backward_than_the_plain_network() -> None:
    block = [nn.Conv3d(4, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(inplace=True)]
    network = nn.Sequential(nn.Conv3d(1, 4, 1), *copy.deepcopy(block), *block)
    x = torch.randn(1, 1, 32, 16, 16)

    def work(mesh: HaloMesh) -> int:
        return saved_bytes(spatial_partition(copy.deepcopy(network), mesh), scatter(x, mesh))

    with captured_once():
        parts = run_ranks(work)
    assert max(parts) < 1.1 * saved_bytes(network, x[:, :, :16])

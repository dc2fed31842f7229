"""The public plan: a function beside its package, printed, with reasons for what it refuses."""

from __future__ import annotations

import importlib

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

import monai_memeff.halo
from monai_memeff.halo import NotPartitionableError, explain, plan, verify


def net() -> nn.Module:
    """A small U-Net."""
    return UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=1).eval()


def test_plan_is_a_function_whatever_is_imported() -> None:
    importlib.import_module("monai_memeff.halo.planning.plan")
    assert monai_memeff.halo.plan is plan
    assert callable(plan)


@pytest.mark.slow
def test_a_plan_prints_what_it_does_and_costs() -> None:
    made = plan(net(), (1, 1, 64, 16, 16), partitions=8)
    assert made.partitions == 8
    assert "model.0.conv.unit0.conv" in str(made)
    assert "conv3d" in str(made)
    assert made.peak_bytes < plan(net(), (1, 1, 64, 16, 16), partitions=2).peak_bytes


@pytest.mark.parametrize("share", [2, 4, 8])
@pytest.mark.slow
def test_a_plan_keeps_its_budget(share: int) -> None:
    network = net()
    whole = plan(network, (1, 1, 64, 16, 16), partitions=1).peak_bytes
    made = plan(network, (torch.empty(1, 1, 64, 16, 16, device="meta"),), memory_budget=whole // share)
    assert made.peak_bytes <= whole // share
    with pytest.raises(NotPartitionableError, match="memory budget"):
        plan(network, (1, 1, 64, 16, 16), partitions=1, memory_budget=whole // share)


class Looks(nn.Module):
    """Takes a branch by the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A data-dependent branch."""
        return x * 2 if x.sum().item() > 0 else x


@pytest.mark.slow
def test_reasons_name_module_and_line() -> None:
    assert explain(net(), (1, 1, 16, 16, 16)) == []
    (reason,) = explain(nn.Sequential(nn.Conv3d(1, 1, 3), Looks()), (1, 1, 16, 16, 16))
    assert "test_plan.py" in reason
    with pytest.raises(NotPartitionableError):
        plan(Looks(), (1, 1, 16, 16, 16))


@pytest.mark.slow
def test_verify_takes_the_inferers_path() -> None:
    assert verify(net(), (1, 1, 24, 12, 12), axis=1) < 1e-10

"""The public plan: a function beside its package, printed, with reasons for what it refuses."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from monai.networks.nets import BasicUNet, UNet
from torch import nn

import monai_memeff.halo
from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer, check, explain, plan, verify
from monai_memeff.halo.planning.waste import wasteful
from tests.halo.ordinary_code import Call


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


OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "numbers": lambda x: x,
    "labels": lambda x: x.argmax(1, keepdim=True),
    "a mask": lambda x: x > 0,
    "complex": lambda x: torch.complex(x, x + 1),
    "infinite": lambda x: x.log(),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_verify_sees_a_wrong_value_of_any_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Call(name, OUTPUTS[name])
    assert verify(network, (1, 2, 5, 4, 3)) == 0
    plain = check.SpatialPartitionInferer.__call__

    def wrong(self: SpatialPartitionInferer, x: torch.Tensor, network: nn.Module) -> torch.Tensor:
        result = plain(self, x, network)
        value = result[0, 0, 4, 1, 2]
        if result.is_floating_point():
            value.fill_(float("nan"))
        else:
            value.copy_(value.conj() if result.is_complex() else value == 0)
        return result

    monkeypatch.setattr(check.SpatialPartitionInferer, "__call__", wrong)
    with pytest.raises(NotPartitionableError, match="parts differ from the whole"):
        verify(network, (1, 2, 5, 4, 3))


@pytest.mark.slow
@pytest.mark.parametrize("upsample", ["deconv", "nontrainable"])
def test_what_costs_little_beside_its_reader_is_not_stored(upsample: str) -> None:
    network = BasicUNet(features=(4, 4, 8, 8, 8, 4), upsample=upsample).double().eval()
    schedule = plan(network, (1, 1, 48, 16, 16), partitions=4).schedule
    stored = {schedule.bound.program[i].operator for i in schedule.stored}
    assert any("conv3d" in name for name in stored)
    assert not any("transpose" in name or "upsample" in name for name in stored), stored
    x = torch.randn(1, 1, 48, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(SpatialPartitionInferer(4)(x, network), network(x).detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("tiles", [2, 24])
def test_tiles_do_not_compute_again_and_again_what_is_not_stored(tiles: int) -> None:
    """Under a wide kernel a thin tile reads many times its own rows."""
    network = nn.Sequential(
        nn.Conv3d(1, 2, 1), nn.Conv3d(2, 8, 3, padding=6, dilation=6), nn.Conv3d(8, 16, 3, padding=6, dilation=6)
    ).double()
    schedule = plan(network, (1, 1, 48, 4, 4), partitions=tiles).schedule
    assert len(schedule.spared) == (2 if tiles == 2 else 1), schedule.spared
    assert not wasteful(schedule)
    x = torch.randn(1, 1, 48, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(SpatialPartitionInferer(tiles)(x, network), network(x).detach(), rtol=0, atol=1e-11)


def test_rows_that_are_computed_do_not_take_a_larger_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(
        nn.ConvTranspose3d(8, 8, (2, 1, 1), (2, 1, 1), groups=8),
        nn.Conv3d(8, 8, 3, padding=(12, 1, 1), dilation=(12, 1, 1)),
    )
    shape, finest = (1, 8, 48, 6, 6), 96
    with monkeypatch.context() as context:
        context.setattr("monai_memeff.halo.planning.schedule.LITTLE", 10**9)
        least = plan(network, shape, partitions=finest).peak_bytes
    assert plan(network, shape, memory_budget=least).peak_bytes <= least
    with pytest.raises(NotPartitionableError, match="needs"):
        plan(network, shape, memory_budget=least - 1)


@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
def test_a_tile_of_a_large_resize_takes_its_share_of_memory(mode: str) -> None:
    """Not that of all rows that torch makes of its input rows."""
    network = nn.Sequential(nn.Upsample(scale_factor=(16, 2, 2), mode=mode), nn.Conv3d(4, 1, 3, padding=1)).double()
    whole, parts = (plan(network, (1, 4, 4, 8, 8), partitions=n).peak_bytes for n in (1, 16))
    assert parts < whole / 5
    x = torch.randn(1, 4, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(SpatialPartitionInferer(16)(x, network), network(x).detach(), rtol=0, atol=1e-11)


def test_what_two_read_or_a_norm_reads_is_stored() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cheap, self.dear = nn.Conv3d(1, 4, 1), nn.Conv3d(4, 4, 3, padding=1)
            self.norm = nn.InstanceNorm3d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, z = self.cheap(x), self.cheap(x + 1)
            return self.dear(y) + self.dear(y.flip(3)) + self.dear(self.norm(z))

    schedule = plan(Twice(), (1, 1, 32, 8, 8), partitions=4).schedule
    stored = [schedule.bound.program[i] for i in sorted(schedule.stored)]
    assert sum("cheap" in str(value.where) for value in stored) == 2

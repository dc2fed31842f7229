"""Random networks of every kind of code that parts could get wrong: equal to the whole, or refused with a reason.

`MEMEFF_HALO_NETWORKS=27 pytest tests/halo/test_kinds.py` tries 27 networks of each kind in ten settings each, more than
3,000 cases; by default three of each kind are tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import nn

from monai_memeff.halo import SpatialPartitionInferer
from tests.halo.kinds import LAYERS, Case, family
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import Tally, clones, plain, try_settings

NETWORKS = int(os.environ.get("MEMEFF_HALO_NETWORKS", "3"))


def runs(network: nn.Module, args: tuple[torch.Tensor, ...]) -> bool:
    """Whether the plain network takes these arguments at all."""
    try:
        plain(network, clones(args))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_parts_of_random_networks_equal_the_whole(kind: str) -> None:
    tally = Tally()

    @settings(max_examples=NETWORKS, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(family(kind))
    def check(case: Case) -> None:
        network, args, chosen = case
        assume(runs(network, args))
        try_settings(network, args, chosen, tally=tally)

    check()
    assert tally.exact > 0.95 * tally.cases, tally.refused


FOUND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a roll that names a dimension twice": lambda x: x.roll((1, -3), (2, 2)),
    "sub-tensors scaled by their norm over all rows": lambda x: x.renorm(2, 1, 1.0),
    "a difference with rows put before": lambda x: x.diff(dim=3, prepend=x[:, :, :, :1]),
    "an operator that runs whole": lambda x: x.cumsum(2),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_random_networks_found(name: str) -> None:
    network = nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), Call(name, FOUND[name]), nn.Conv3d(2, 2, 3, padding=1))
    x = torch.randn(1, 2, 11, 6, 5, dtype=torch.float64)
    assert try_settings(network.double(), (x,), [(0, 3), (1, 2)]).exact == 2


def test_training_mode_leaves_buffers_as_they_were() -> None:
    network = nn.Sequential(
        nn.BatchNorm3d(2), nn.Conv3d(2, 2, 3), nn.InstanceNorm3d(2, track_running_stats=True)
    ).train()
    x = torch.randn(1, 2, 11, 6, 5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    SpatialPartitionInferer(3)(x, network)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

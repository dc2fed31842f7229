"""Random networks of every kind of code that parts could get wrong: equal to the whole, or refused with a reason.

`MEMEFF_HALO_NETWORKS=27 pytest tests/halo/test_kinds.py` tries 27 networks of each kind in ten settings each, more than
3,000 cases; by default three of each kind are tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import nn

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from tests.halo.kinds import LAYERS, Case, family
from tests.halo.more_kinds import drawing, hooked, several
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import Tally, clones, difference, one_capture, plain, try_settings

NETWORKS = int(os.environ.get("MEMEFF_HALO_NETWORKS", "3"))
TRIED: dict[str, int] = {}
"""Cases that were compared or refused, by test."""


def runs(network: nn.Module, args: tuple[torch.Tensor, ...]) -> bool:
    """Whether the plain network takes these arguments at all."""
    try:
        plain(network, clones(args))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


@pytest.mark.exhaustive
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
    TRIED[kind] = tally.cases
    assert tally.exact > 0.95 * tally.cases, tally.refused


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [hooked, several])
def test_hooks_and_further_inputs(kind: Callable[..., Any]) -> None:
    tally = Tally()

    @settings(max_examples=NETWORKS, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(kind())
    def check(case: Case) -> None:
        network, args, chosen = case
        assume(runs(network, args))
        try_settings(network, args, chosen, tally=tally)

    check()
    TRIED[kind.__name__] = tally.cases
    assert tally.exact > 0.95 * tally.cases, tally.refused


@pytest.mark.exhaustive
def test_random_numbers_do_not_depend_on_the_parts() -> None:
    """Two draws differ, two runs from one seed are equal under any cut, or the network is refused."""
    same: list[int] = []
    refused: list[str] = []

    @settings(max_examples=NETWORKS, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(drawing())
    def check(case: Case) -> None:
        network, args, chosen = case
        assume(runs(network, args))
        with one_capture():
            results = []
            for axis, parts in [(0, 1), *chosen]:
                torch.manual_seed(3)
                try:
                    results.append(SpatialPartitionInferer(parts, axis=axis)(args[0], network))
                except NotPartitionableError as refusal:
                    refused.append(str(refusal))
        assert len(results) in (0, 1 + len(chosen)), refused
        for result in results[1:]:
            assert difference(result, results[0]) < 1e-9, (network, chosen)
            same.append(1)

    check()
    TRIED["random numbers"] = len(same) + len(refused)
    assert same
    assert all("draws random numbers" in reason for reason in refused)


@pytest.mark.exhaustive
def test_as_many_cases_as_are_promised_were_tried() -> None:
    if len(TRIED) < len(LAYERS) + 3 or NETWORKS < 27:
        pytest.skip("counts the cases of all tests above, in one process, with MEMEFF_HALO_NETWORKS=27")
    print(f"{sum(TRIED.values())} cases: {TRIED}")
    assert sum(TRIED.values()) >= 3000


FOUND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a roll that names a dimension twice": lambda x: x.roll((1, -3), (2, 2)),
    "sub-tensors scaled by their norm over all rows": lambda x: x.renorm(2, 1, 1.0),
    "a difference with rows put before": lambda x: x.diff(dim=3, prepend=x[:, :, :, :1]),
    "an operator that runs whole": lambda x: x.cumsum(2),
    "a group norm whose channels are cut": lambda x: nn.functional.group_norm(x.transpose(1, 2), 11).transpose(1, 2),
    "a batch norm whose channels are cut": lambda x: nn.functional.batch_norm(
        x.transpose(1, 2), torch.arange(11.0).double(), torch.arange(1.0, 12.0).double()
    ).transpose(1, 2),
    "an affine instance norm whose channels are cut": lambda x: nn.functional.instance_norm(
        x.transpose(1, 2), weight=torch.arange(11.0).double(), bias=torch.arange(11.0).double()
    ).transpose(1, 2),
    "moments of complex numbers": lambda x: (
        x * torch.complex(x, x**2).std() + torch.var_mean(torch.complex(x, x + 3), (2, 3), keepdim=True)[1].imag
    ),
    "a sum of truth values": lambda x: x * (x * 0.3).sum(2, keepdim=True, dtype=torch.bool),
    "a number given as a tensor": lambda x: x * x.new_full((2, 1, 1, 1), 2.0),
    "places of the largest where all are -inf": lambda x: nn.functional.max_pool3d(
        x.masked_fill(x < 9, -torch.inf), 3, 2, 1, return_indices=True
    )[1].to(x.dtype),
    "a view of one element": lambda x: x * x[:, :1, 3:4].amax((3, 4), keepdim=True).view(1, 1, 1),
    "no rows": lambda x: torch.cat([x[:, :, 20::2].reshape(1, 2, 0, 6, 5), x, x[:, :, 11:]], 2),
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.slow
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

"""What a plan promises is what a run takes: several networks, budgets and numbers of parts."""

from __future__ import annotations

import contextlib
from functools import cache

import pytest
import torch
from torch import nn

from monai_memeff.halo.planning.estimate import Estimate, by_partitions
from monai_memeff.halo.planning.plan import Plan, make_plan
from monai_memeff.halo.run.stores import HostStore
from monai_memeff.halo.run.stream import Stream
from tests.halo.networks import NETWORKS

CPU = torch.device("cpu")
SHAPE = (1, 1, 48, 20, 16)
NAMES = ["UNet instance", "UNet batch", "BasicUNet deconv", "SegResNet", "PlainConvUNet", "ResidualEncoderUNet"]


@cache
def known(name: str) -> tuple[nn.Module, torch.Tensor, Plan]:
    """A network, a volume and the plan of one tile."""
    torch.manual_seed(0)
    network, x = NETWORKS[name]().eval(), torch.randn(SHAPE)
    return network, x, make_plan(network, (x,), {}, 1, None, 0, CPU)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("partitions", "share"), [(3, None), ("auto", 2), ("auto", 4), ("auto", 6)])
@pytest.mark.long
def test_the_planned_peak_bounds_the_measured_one(name: str, partitions: int | str, share: int | None) -> None:
    network, x, one = known(name)
    budget = None if share is None else one.peak_bytes // share
    program = one.schedule.bound.program
    made = make_plan(network, (x,), {}, partitions, budget, 0, CPU, program=program)
    stream = Stream(made, network, HostStore(CPU))
    stream((x,), {})
    assert stream.peak_bytes <= made.peak_bytes <= (budget or one.peak_bytes)
    assert made.peak_bytes <= 1.1 * stream.peak_bytes + 4096  # moments and the like, all alive at once in the account


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_remembered_forms_count_the_same_bytes(name: str) -> None:
    schedule = known(name)[2].schedule
    found = []
    for remember in (True, False):
        estimate = Estimate(schedule, CPU)
        if not remember:
            estimate._remembering = contextlib.nullcontext()  # type: ignore[assignment]
        by_partitions(estimate, 4)
        found.append([(job.tiles, job.peak) for job in schedule.jobs])
    assert found[0] == found[1]


class Recurrent(nn.Module):
    """A recurrent layer along the axis that is cut."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T) to (B, K, T)."""
        y: torch.Tensor = self.layer(x.transpose(1, 2))[0]
        return y.transpose(1, 2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "both ways"])
@pytest.mark.slow
def test_recurrent_layers_keep_their_promise(kind: type[nn.RNNBase], more: dict[str, int]) -> None:
    network, x = Recurrent(kind(4, 8, batch_first=True, **more)).double().eval(), torch.randn(2, 4, 100).double()
    made = make_plan(network, (x,), {}, 2, None, 0, CPU)
    stream = Stream(made, network, HostStore(CPU))
    stream((x,), {})
    assert stream.peak_bytes <= made.peak_bytes

"""Copies that run beside the computation, here as late as they may: every wait for them is where it must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from monai_memeff.halo.planning.plan import Plan, make_plan
from monai_memeff.halo.planning.tile import Copies, Worker
from monai_memeff.halo.run import stream as streaming
from monai_memeff.halo.run.stores import HostStore
from monai_memeff.halo.run.stream import Stream
from tests.halo.networks import NETWORKS
from tests.halo.ranks.test_network import made

CPU = torch.device("cpu")
NAMES = ["UNet instance", "BasicUNet deconv", "SegResNetDS", "ResidualEncoderUNet", "UNet batch"]


class Late(Copies):
    """Every copy is made when something waits for it, and counts."""

    def __init__(self) -> None:
        self.reads, self.writes, self.done = list[Callable[[], object]](), list[Callable[[], object]](), 0

    def read(self, copy: Callable[[], object]) -> None:
        self.reads.append(copy)

    def write(self, copy: Callable[[], object]) -> None:
        self.writes.append(copy)

    def arrive(self) -> None:
        self._make(self.reads)

    def leave(self) -> None:
        self._make(self.writes)

    def _make(self, copies: list[Callable[[], object]]) -> None:
        self.done += len(copies)
        for copy in copies:
            copy()
        copies.clear()


def copied_late(rows: torch.Tensor, device: torch.device, copies: Copies) -> torch.Tensor:
    """Rows as from a device of its own: not a number until they are there."""
    out = torch.full(rows.shape, math.nan, dtype=rows.dtype) if rows.dtype.is_floating_point else rows.clone()
    copies.read(lambda: out.copy_(rows))
    return out


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Plan]:
    """A network and a plan of five tiles whose copies run beside the computation."""
    network = made(NETWORKS[request.param]).eval()
    plan = make_plan(network, (torch.empty(2, 1, 48, 16, 16, dtype=torch.float64),), {}, 5, None, 0, CPU)
    for job in plan.schedule.jobs:
        job.ahead = job.tiles > 1
    monkeypatch.setattr(streaming, "to_device", copied_late)
    return network, plan


def streamed(network: nn.Module, plan: Plan, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """What a stream of the plan returns, and the number of copies."""
    stream = Stream(plan, network, HostStore(CPU))
    stream.copies = late = Late()
    found = stream((x,), {})
    assert not late.reads
    assert not late.writes
    return [found] if isinstance(found, torch.Tensor) else list(found), late.done


@torch.no_grad()
@pytest.mark.slow
def test_late_copies_change_nothing(case: tuple[nn.Module, Plan]) -> None:
    network, plan = case
    x = torch.randn(2, 1, 48, 16, 16, dtype=torch.float64)
    expected = network(x)
    found, copies = streamed(network, plan, x)
    assert copies > 30
    for one, whole in zip(found, [expected] if isinstance(expected, torch.Tensor) else expected, strict=True):
        torch.testing.assert_close(one, whole, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.slow
def test_a_full_device_stops_reading_ahead_and_then_halves(
    case: tuple[nn.Module, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, plan = case
    x = torch.randn(2, 1, 48, 16, 16, dtype=torch.float64)
    tile, seen = Worker.tile, []

    def limited(self: Worker, job, box, whole, states, following=None):  # type: ignore[no-untyped-def]
        rows, ahead = box[0][1] - box[0][0], following is not None
        seen.append((job.index, rows, ahead))
        if job.domain.spread and job.tiles > 1 and (ahead or 2 * job.tiles * rows > 2 * job.rows) and rows > 1:
            if len(seen) % 2:  # half of the time the tile is computed, and its copies are on their way
                tile(self, job, box, whole, dict(states), following)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return tile(self, job, box, whole, states, following)

    monkeypatch.setattr(Worker, "tile", limited)
    found, _ = streamed(network, plan, x)
    expected = network(x)
    for one, whole in zip(found, [expected] if isinstance(expected, torch.Tensor) else expected, strict=True):
        torch.testing.assert_close(one, whole, rtol=0, atol=1e-9)
    first = [entry for entry in seen if entry[0] == seen[-1][0]]
    assert [entry[2] for entry in first[:2]] == [True, False]
    assert first[1][1] == first[0][1]

"""The exchange as a linear map: its backward is its adjoint, and its integers are right."""

from __future__ import annotations

import itertools

import pytest
import torch

from monai_memeff.halo.arithmetic import cut, plan, segments
from monai_memeff.halo.exchange import Flight, all_sum, finish, start, strip_boxes, window
from monai_memeff.halo.mesh import virtual_mesh
from monai_memeff.halo.virtual import Hub

CASES = {
    "one neighbor": (((0, 3, 6),), 1, False),
    "uneven": (((0, 2, 4, 9),), 2, False),
    "wider than the neighbor": (((0, 1, 2, 3, 4),), 3, False),
    "two axes": (((0, 2, 5), (0, 3, 4)), 1, False),
    "circular": (((0, 2, 4),), 1, True),
    "circular alone": (((0, 4),), 2, True),
}


def windows(bounds: tuple[tuple[int, ...], ...], width: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Every part grown by a width, beyond the volume too."""
    return tuple(tuple((lo - width, hi + width) for lo, hi in itertools.pairwise(b)) for b in bounds)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("overlapped", [False, True])
def test_backward_is_the_adjoint(case: tuple, overlapped: bool) -> None:
    bounds, width, periodic = case
    if overlapped and periodic:
        return
    shape = tuple(len(b) - 1 for b in bounds)
    hub = Hub(torch.Size(shape).numel())
    mesh = virtual_mesh(hub, shape)
    dims = tuple(range(-len(bounds), 0))

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(rank)
        messages = plan(rank, bounds, windows(bounds, width), periodic)
        size = [hi - lo for lo, hi in messages.own]
        x = torch.randn(1, 2, *size, dtype=torch.float64, generator=generator, requires_grad=True)
        if overlapped:
            flight = Flight(mesh.comm, dims, messages)
            inner, token = start(flight, x)
            outputs = (inner, *finish(flight, token))
            assert len(outputs) == 1 + len(strip_boxes(messages))
        else:
            outputs = (window(mesh.comm, dims, x, messages),)
        others = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in outputs]
        forward = sum((o * y).sum() for o, y in zip(outputs, others, strict=True))
        forward.backward()
        return forward.detach(), (x.detach() * x.grad).sum()

    left, right = (torch.stack(list(side)).sum() for side in zip(*hub.run(work), strict=True))
    torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)


def test_a_window_holds_the_rows_of_the_volume() -> None:
    bounds, hub = ((0, 2, 3, 7),), Hub(3)
    mesh = virtual_mesh(hub, (3,))
    volume = torch.arange(1.0, 8.0).view(1, 1, 7)

    def work(rank: int) -> list[float]:
        messages = plan(rank, bounds, windows(bounds, 3))
        lo, hi = messages.own[0]
        return window(mesh.comm, (-1,), volume[..., lo:hi], messages, fill=-1.0).flatten().tolist()

    assert hub.run(work) == [
        [-1, -1, -1, 1, 2, 3, 4, 5],
        [-1, 1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6, 7, -1, -1, -1],
    ]


def test_all_sum_is_its_own_adjoint() -> None:
    hub = Hub(3)
    mesh = virtual_mesh(hub, (3,))

    def work(rank: int) -> torch.Tensor:
        x = torch.ones(2, requires_grad=True)
        (all_sum(mesh.comm, x) * (rank + 1)).sum().backward()
        return x.grad

    assert all(torch.equal(g, torch.full((2,), 6.0)) for g in hub.run(work))


def test_cuts_stand_at_multiples_and_the_last_part_takes_the_rest() -> None:
    assert cut(43, 3, 4) == (0, 12, 24, 43)
    with pytest.raises(ValueError, match="at most 2 parts"):
        cut(11, 3, 4)


def test_segments_name_owners_by_hand() -> None:
    found = [(s.part, s.source, s.offset) for s in segments((-1, 5), (0, 2, 3, 7))]
    assert found == [(0, (0, 2), 1), (1, (2, 3), 3), (2, (3, 5), 4)]


def test_one_rank_that_fails_ends_all_and_a_deadlock_is_named() -> None:
    hub = Hub(3)
    mesh = virtual_mesh(hub, (3,))

    def fails(rank: int) -> None:
        if rank == 1:
            raise KeyError("boom")
        mesh.comm.all_reduce(torch.ones(1))

    with pytest.raises(KeyError, match="boom"):
        hub.run(fails)
    lonely = Hub(2)
    alone = virtual_mesh(lonely, (2,))
    with pytest.raises(RuntimeError, match="Deadlock"):
        lonely.run(lambda rank: alone.comm.all_reduce(torch.ones(1)) if rank == 0 else None)

"""Redistribution of rows and gathering of partial results as linear maps: right values, and the adjoint backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_memeff.halo.run.ranks.comm.exchange import gather_partials, redistribute, sum_loss
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh, even_cuts
from monai_memeff.halo.run.ranks.comm.routes import coordinates, own_rows, route
from monai_memeff.halo.run.ranks.comm.transport import PeerLostError
from tests.halo.ranks.threads import run_ranks

Case = tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...], list[Any]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Mesh, sizes, cuts (empty parts too) and what every rank wants: several ranges per axis, repeated and empty."""
    shape = draw(st.sampled_from([(1,), (2,), (3,), (4,), (2, 2), (1, 3), (3, 2)]))
    sizes = tuple(draw(st.integers(1, 7)) for _ in shape)
    cuts: list[tuple[int, ...] | None] = []
    for parts, size in zip(shape, sizes, strict=True):
        inner = sorted(draw(st.lists(st.integers(0, size), min_size=parts - 1, max_size=parts - 1)))
        cuts.append(draw(st.sampled_from([(0, *inner, size), None])))
    spans = [st.integers(0, n).flatmap(lambda a, n=n: st.tuples(st.just(a), st.integers(a, n))) for n in sizes]
    ranks = torch.Size(shape).numel()
    wants = [tuple(tuple(draw(st.lists(s, max_size=3))) for s in spans) for _ in range(ranks)]
    return shape, sizes, tuple(cuts), wants


def _rows(x: torch.Tensor, want: Any) -> torch.Tensor:
    """The wanted rows of a whole (2, split axes..., 3)."""
    for dim, spans in enumerate(want, start=1):
        index = [i for low, high in spans for i in range(low, high)]
        x = x.index_select(dim, torch.tensor(index, dtype=torch.long))
    return x


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@pytest.mark.slow
def test_every_rank_gets_what_it_wants_and_backward_is_the_adjoint(case: Case) -> None:
    shape, sizes, cuts, wants = case
    dims = tuple(range(1, 1 + len(shape)))
    whole = torch.randn(2, *sizes, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def work(mesh: HaloMesh) -> tuple[torch.Tensor, torch.Tensor]:
        rank = mesh.comm.rank
        own = own_rows(cuts, sizes, coordinates(rank, shape))
        x = _rows(whole, [(s,) for s in own]).requires_grad_()
        y = redistribute(mesh.comm, x, dims, route(rank, shape, sizes, cuts, wants)) * 1.0
        assert torch.equal(y, _rows(whole, wants[rank]))
        other = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(rank))
        (y * other).sum().backward()
        return (y * other).sum().detach(), (x * x.grad).sum().detach()

    left, right = (torch.stack(side).sum() for side in zip(*run_ranks(work, shape), strict=True))
    torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)


def test_an_interior_rank_sends_one_message_per_neighbor() -> None:
    shape, sizes, cuts = (4, 4), (16, 16), (even_cuts(16, 4), even_cuts(16, 4))

    def want(rank: int) -> tuple[Any, ...]:
        here = coordinates(rank, shape)
        return tuple(((max(b[p] - 1, 0), min(b[p + 1] + 1, 16)),) for p, b in zip(here, cuts, strict=True))

    found = route(5, shape, sizes, cuts, [want(r) for r in range(16)])
    around = sorted({5 + a + b for a, b in itertools.product((-4, 0, 4), (-1, 0, 1))} - {5})
    assert [peer for peer, _ in found.sends] == [peer for peer, _ in found.receives] == around
    assert found.window == (6, 6)


def test_rows_outside_the_tensor_are_an_error_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="Rows 2 to 9 were wanted of a tensor that has 8"):
        route(0, (2,), (8,), ((0, 4, 8),), [(((2, 9),),), (((0, 0),),)])


def test_only_rows_that_others_want_leave_a_rank() -> None:
    wants = [(((0, 4),),), (((3, 8),),)]

    def work(mesh: HaloMesh) -> tuple[int, bool]:
        x = torch.ones(1, 4, 5)
        y = redistribute(mesh.comm, x, (1,), route(mesh.comm.rank, (2,), (8,), ((0, 4, 8),), wants))
        return mesh.comm.sent_bytes, y.shape[1] == 4 + mesh.comm.rank

    assert run_ranks(work) == [(20, True), (0, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_any_dtype_travels(dtype: torch.dtype) -> None:
    whole = torch.arange(12).view(1, 6, 2).to(dtype)
    wants = [(((0, 6),),), (((5, 6), (0, 2)),)]

    def work(mesh: HaloMesh) -> torch.Tensor:
        mine = whole[:, 3 * mesh.comm.rank : 3 * mesh.comm.rank + 3]
        return redistribute(mesh.comm, mine, (1,), route(mesh.comm.rank, (2,), (6,), ((0, 3, 6),), wants))

    first, second = run_ranks(work)
    assert torch.equal(first, whole)
    assert torch.equal(second, whole[:, [5, 0, 1]])


def test_partial_results_meet_on_all_ranks_and_their_gradients_come_home() -> None:
    def work(mesh: HaloMesh) -> list[torch.Tensor]:
        rank = mesh.comm.rank
        mean = torch.full((2,), float(rank + 1), requires_grad=True)
        count, wave = torch.tensor([rank + 5]), torch.full((1,), 1j * rank, requires_grad=True)
        rows = gather_partials(mesh.comm, [mean, count, wave])
        assert [int(c) for _, c, _ in rows] == [5, 6, 7]
        assert [complex(w.detach()) for *_, w in rows] == [0, 1j, 2j]
        sum((r + 1) * (rank + 1) * (m.sum() + w.imag) for r, (m, _, w) in enumerate(rows)).sum().backward()
        return [mean.grad, wave.grad]

    for rank, (gradient, waves) in enumerate(run_ranks(work, (3,))):
        assert gradient.tolist() == [6.0 * (rank + 1)] * 2
        assert waves.tolist() == [6.0j * (rank + 1)]


def test_the_loss_is_the_same_on_all_ranks_and_its_gradient_stays() -> None:
    def work(mesh: HaloMesh) -> tuple[float, float]:
        x = torch.tensor(float(mesh.comm.rank + 1), requires_grad=True)
        y = sum_loss(mesh.comm, x * 3)
        y.backward()
        return float(y.detach()), float(x.grad)

    assert run_ranks(work, (3,)) == [(18.0, 3.0)] * 3


def test_one_rank_that_fails_ends_all() -> None:
    def work(mesh: HaloMesh) -> None:
        if mesh.comm.rank == 1:
            raise KeyError("boom")
        mesh.comm.all_gather(torch.ones(1))

    with pytest.raises(KeyError, match="boom"):
        run_ranks(work, (3,))
    assert issubclass(PeerLostError, RuntimeError)

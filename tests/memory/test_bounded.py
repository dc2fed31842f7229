"""A budget on a GPU bounds torch's allocator while work runs, and only then."""

from __future__ import annotations

import pytest
import torch

from monai_memeff.memory.budget import SEGMENTS, bounded

GPU, CARD, HELD = torch.device("cuda", 0), 100 * 2**30, 3 * 2**30


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What torch was told, of a card whose user allows torch 0.9 of it."""
    told = [0.9]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (CARD - HELD, CARD))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: HELD)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: told[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: told.append(share))
    return told


def bytes_of(share: float) -> int:
    """Bytes of the budgets that make a share."""
    return round(share * CARD) - HELD - SEGMENTS


def test_the_bound_ends_with_the_work(shares: list[float]) -> None:
    bound = bounded(GPU, 2**30)
    bound.__enter__()
    assert bytes_of(shares[-1]) == 2**30
    error = ValueError("no luck")
    assert not bound.__exit__(ValueError, error, None)
    assert shares[-1] == 0.9


def test_bounds_of_several_threads_add_up_and_end_in_any_order(shares: list[float]) -> None:
    first, second = bounded(GPU, 2**30), bounded(GPU, 2**31)
    first.__enter__()
    second.__enter__()
    assert bytes_of(shares[-1]) == 2**30 + 2**31
    first.__exit__(None, None, None)
    assert bytes_of(shares[-1]) == 2**31
    second.__exit__(None, None, None)
    assert shares[-1] == 0.9
    with bounded(GPU, CARD):
        assert shares[-1] == 0.9  # never more than the user allows


def test_nothing_is_bounded_elsewhere(shares: list[float]) -> None:
    with bounded(torch.device("cpu"), 1), bounded(GPU, None):
        assert shares == [0.9]

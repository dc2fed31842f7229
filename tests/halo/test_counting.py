"""What forward counts from call to call: goes on as in plain calls, or is refused by name."""

from __future__ import annotations

import functools
import itertools
import logging
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from monai_memeff.halo.planning.state.fingerprint import fingerprint
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import difference, plain


def volume() -> torch.Tensor:
    return torch.randn(1, 2, 11, 6, 5, dtype=torch.float64)


class Draws(nn.Module):
    """Multiplies with the next number of something that Python or a library counts with."""

    def __init__(self, make: Callable[[], Callable[[], float]]) -> None:
        super().__init__()
        self.following = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A part of the sequence."""
        return x * (self.following() + 1)


def counted() -> Iterator[int]:
    yield from range(9)


def flipping() -> Callable[[], float]:
    state = [0]

    def following() -> float:
        state[0] = 1 - state[0]
        return state[0]

    return following


def function_with_a_count() -> Callable[[], float]:
    def following() -> float:
        following.count += 1.5  # type: ignore[attr-defined]
        return following.count  # type: ignore[attr-defined]

    following.count = 0  # type: ignore[attr-defined]
    return following


def grows(add: Callable[[int], None], container: Any) -> Callable[[], float]:
    def following() -> float:
        add(len(container))
        return len(container)

    return following


def set_that_grows() -> Callable[[], float]:
    seen = set[int]()
    return grows(seen.add, seen)


def array_that_grows() -> Callable[[], float]:
    array = np.array([[], 1], object)
    return grows(array[0].append, array[0])


class Kind(list[int]):
    """A list with an attribute."""

    calls = 0

    def following(self) -> float:
        """The next number."""
        self.calls += 1
        return self.calls


SEQUENCES: dict[str, Callable[[], Callable[[], float]]] = {
    "an iterator": lambda: functools.partial(next, itertools.count()),
    "a generator": lambda: functools.partial(next, counted()),
    "an iterator of a list": lambda: iter([1.5, 2.5, 3.5, 4.5]).__next__,
    "Python's generator of random numbers": lambda: random.Random(1).random,
    "NumPy's": lambda: np.random.default_rng(1).random,
    "NumPy's older": lambda: np.random.RandomState(1).rand,
    "a closure that comes back to where it was": flipping,
    "an attribute of a function": function_with_a_count,
    "an attribute of a list": lambda: Kind().following,
    "a set": set_that_grows,
    "an array of objects": array_that_grows,
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.long
def test_what_counts_outside_of_the_modules_goes_on_as_in_plain_calls(name: str) -> None:
    """Every call makes a plan of its own: forward runs once for each."""
    network, same, x, inferer = Draws(SEQUENCES[name]), Draws(SEQUENCES[name]), volume(), SpatialPartitionInferer(3)
    for _ in range(4):
        assert difference(inferer(x, network), plain(same, (x,))) == 0


class Counts(nn.Module):
    """Counts its calls in attributes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.calls, self.seen, self.first = way, 0, [0], True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Uses a count, or does not."""
        self.calls += 1
        self.seen[0] += 1
        first, self.first = self.first, False
        factor = {"number": self.calls, "list": self.seen[0], "flag": 3 if first else 4, "unused": 2}[self.way]
        return x * factor


@pytest.mark.parametrize("way", ["number", "list", "flag", "unused"])
@pytest.mark.slow
def test_a_count_that_forward_keeps_in_a_module_is_refused_if_it_is_used(way: str) -> None:
    network, x = Counts(way), volume()
    if way == "unused":
        assert difference(SpatialPartitionInferer(3)(x, network), x * 2) == 0
    else:
        with pytest.raises(NotPartitionableError, match="forward changes the attribute"):
            SpatialPartitionInferer(3)(x, network)
    assert (network.calls, network.seen, network.first) == (0, [0], True)


def test_things_that_hold_no_numbers_change_nothing() -> None:
    network = Call("logs", lambda x: x * len(PATTERN.pattern) if LOCK and LOG.isEnabledFor(10) else x)
    assert fingerprint(network) == fingerprint(network)


LOG, PATTERN, LOCK = logging.getLogger(__name__), re.compile("ab"), threading.Lock()

"""Random numbers by position: the right distribution, the same under any cut, others for every node and seed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from monai_memeff.halo.planning.layout import Layout, narrow
from monai_memeff.halo.planning.program import Ref, Value
from monai_memeff.halo.planning.rules import RULES
from monai_memeff.halo.planning.rules.base import Env
from monai_memeff.halo.planning.rules.random import Draw, Dropout, hashed
from monai_memeff.halo.planning.rules.table import EXPANDERS

LAYOUT = Layout((((3, -1),), ((4, -1), (5, 0), (2, -1)), ((6, 1),)), 2)  # one axis inside a dimension, as in windows
CPU = torch.device("cpu")


def draw(kind: str, number: float = 0.0, name: str = "node") -> Draw:
    """A step that draws."""
    return Draw(Value(name, LAYOUT.shape, torch.float32, "halo.draw", (kind, number)), (), (), LAYOUT)


@pytest.mark.parametrize(("kind", "number"), [("uniform", 0.0), ("normal", 0.0), ("bernoulli", 0.3)])
def test_boxes_are_rows_of_the_whole(kind: str, number: float) -> None:
    step = draw(kind, number)
    whole = step.compute([], (), LAYOUT.whole, Env(CPU, 5))
    ranges = [[(0, 2), (2, 2), (2, 5)], [(0, 1), (1, 6)]]
    for box in itertools.product(*ranges):
        assert torch.equal(step.compute([], (), box, Env(CPU, 5)), narrow(whole, LAYOUT, LAYOUT.whole, box))
    others = [
        step.compute([], (), LAYOUT.whole, Env(CPU, 6)),
        draw(kind, number, "other").compute([], (), LAYOUT.whole, Env(CPU, 5)),
    ]
    assert not any(torch.equal(whole, other) for other in others)


def test_numbers_have_their_distribution() -> None:
    layout = Layout((((400, -1),), ((500, 0),)), 1)

    def numbers(kind: str, number: float = 0.0) -> torch.Tensor:
        step = Draw(Value("n", layout.shape, torch.float64, "halo.draw", (kind, number)), (), (), layout)
        return step.compute([], (), layout.whole, Env(CPU, 1))

    uniform, normal, ones = numbers("uniform"), numbers("normal"), numbers("bernoulli", 0.3)
    histogram = torch.histc(uniform, 20, 0, 1) / uniform.numel()
    assert float((histogram - 0.05).abs().max()) < 0.002
    assert abs(float(uniform[:, 1:].flatten() @ uniform[:, :-1].flatten()) / (400 * 499) - 0.25) < 0.003
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.01
    assert abs(float((normal.abs() < 1).double().mean()) - 0.6827) < 0.005
    assert abs(float(ones.mean()) - 0.3) < 0.005
    assert set(ones.unique().tolist()) == {0.0, 1.0}


def test_neighbors_and_keys_share_no_bits() -> None:
    line = torch.arange(4096)
    for a, b in ((hashed(line, 7), hashed(line + 1, 7)), (hashed(line, 7), hashed(line, 8))):
        different = sum((((a ^ b) >> bit) & 1).double().mean() for bit in range(53)) / 53
        assert abs(float(different) - 0.5) < 0.01


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout_keeps_the_mean_and_its_gradient(p: float) -> None:
    layout = Layout((((2, -1),), ((3000, 0),)), 1)
    value = Value("d", layout.shape, torch.float64, "halo.dropout", (Ref(0), p))
    step: Any = Dropout(value, (0,), (layout,), layout)
    x = torch.ones(layout.shape, dtype=torch.float64, requires_grad=True)
    y = step.compute([x], (), layout.whole, Env(CPU, 3))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert abs(float(y.detach().mean()) - (p < 1)) < 0.05


def test_only_rules_about_random_numbers_know_operators_that_draw() -> None:
    """A draw inside another rule would differ from tile to tile; attention refuses its dropout itself."""
    seeded = {
        str(t) for t in RULES if torch.Tag.nondeterministic_seeded in getattr(t, "tags", ()) and t not in EXPANDERS
    }
    assert seeded <= {"aten.scaled_dot_product_attention.default"}

"""Every name that nnunet_plugins offers has an example in its docstring, and the example does what it says."""

from __future__ import annotations

import doctest
import sys

import pytest

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

import nnunet_plugins
from nnunet_plugins import certify

OFFERED = [
    getattr(package, name) for package in (nnunet_plugins, certify) for name in package.__all__ if name != "TRAINERS"
]


@pytest.mark.parametrize("thing", OFFERED, ids=lambda thing: thing.__name__)
@pytest.mark.slow
def test_an_example_does_what_it_says(thing: object) -> None:
    module = vars(sys.modules[thing.__module__])
    test = doctest.DocTestParser().get_doctest(thing.__doc__ or "", dict(module), thing.__module__, None, 0)
    assert 0 < sum(example.source.count("\n") for example in test.examples) <= 6
    told: list[str] = []
    assert doctest.DocTestRunner().run(test, out=told.append).failed == 0, "".join(told)

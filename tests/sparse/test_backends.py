"""The table of engines: what is listed, what is usable, how one is chosen, and the contract of convolve()."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from monai_memeff.sparse import SparseConv3d, SparseTensor, backends
from monai_memeff.sparse.backends import native, registry
from monai_memeff.sparse.backends.native import product
from monai_memeff.sparse.kernel_map import ConvolutionGeometry
from tests.sparse.reference import random_mask

SHAPE = (5, 4, 6)


@pytest.fixture(autouse=True)
def _a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))
    monkeypatch.setattr(registry, "_chosen", None)
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)


def add_engine(monkeypatch: pytest.MonkeyPatch, name: str, reason: str | None) -> types.ModuleType:
    """Register a made-up engine that counts its calls and computes with the native one."""
    module = types.ModuleType(f"made_up_{name}")
    module.calls = 0

    def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
        module.calls += 1
        return native.convolve(features, weight, bias, geometry)

    module.convolve, module.unavailable = convolve, lambda: reason
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backends.register(name, module.__name__)
    return module


def example() -> tuple[SparseConv3d, SparseTensor]:
    """A layer and an input."""
    return SparseConv3d(2, 3), SparseTensor.from_dense(torch.randn(1, 2, *SHAPE), random_mask(1, SHAPE, 0.5))


def test_status_lists_every_engine_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(monkeypatch, "good", None)
    add_engine(monkeypatch, "bad", "needs a quantum computer")
    backends.register("missing", "no_such_module_anywhere")
    status = backends.status()
    assert status["native"] is None
    assert status["good"] is None
    assert status["bad"] == "needs a quantum computer"
    assert "no_such_module_anywhere" in status["missing"]
    assert list(status) == list(registry.BACKENDS)


def test_the_chosen_engine_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = add_engine(monkeypatch, "good", None)
    layer, x = example()
    assert backends.current() is native
    expected = layer(x).features
    backends.use("good")
    assert backends.current() is engine
    assert torch.equal(layer(x).features, expected)
    assert engine.calls == 1
    backends.use(None)
    assert backends.current() is native


def test_the_environment_chooses_too_and_use_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = add_engine(monkeypatch, "good", None)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "good")
    assert backends.current() is engine
    backends.use("native")
    assert backends.current() is native


def test_unknown_unusable_and_doubled_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(monkeypatch, "bad", "needs a quantum computer")
    with pytest.raises(ValueError, match=r"must be one of native.*got 'nativ'"):
        backends.use("nativ")
    with pytest.raises(ValueError, match=r"'bad' cannot be used here: needs a quantum computer\. Use 'native'"):
        backends.use("bad")
    assert backends.current() is native
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "bad")
    with pytest.raises(ValueError, match="quantum"):
        backends.current()
    with pytest.raises(ValueError, match=r"'native' is registered already.*another name"):
        backends.register("native", "anything")


@pytest.mark.parametrize("name", [name for name, reason in backends.status().items() if reason is None])
def test_every_usable_engine_agrees_with_the_native_one(name: str) -> None:
    """Outputs and gradients of a submanifold and a strided convolution in float32."""
    layers = torch.nn.Sequential(SparseConv3d(2, 3), SparseConv3d(3, 4, 2, 2), SparseConv3d(4, 4))
    _, x = example()
    found = []
    for engine in ("native", name):
        backends.use(engine)
        features = x.features.clone().requires_grad_()
        y = layers(x.replace(features)).features
        found.append([y, *torch.autograd.grad(y.square().sum(), [features, *layers.parameters()])])
    for reference, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 2**30], ids=["many blocks", "one block"])
def test_block_size_does_not_change_the_result(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Sequential(SparseConv3d(2, 3), SparseConv3d(3, 4, 2, 2)).double()
    x = SparseTensor.from_dense(torch.randn(2, 2, 11, 9, 8).double(), random_mask(2, (11, 9, 8), 0.5))

    def run() -> list[Tensor]:
        features = x.features.clone().requires_grad_()
        y = layer(x.replace(features)).features
        return [y, *torch.autograd.grad(y.square().sum(), [features, *layer.parameters()])]

    expected = run()
    monkeypatch.setattr(product, "MIN_BLOCK_ROWS", 7)
    monkeypatch.setitem(product.BLOCK_ELEMENTS, "cpu", elements)
    for ours, reference in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not product.has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("occupancy", [0.3, 1.0])
def test_onednn_and_torch_multiply_alike(occupancy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Sequential(SparseConv3d(2, 5), SparseConv3d(5, 4, 3, 2), SparseConv3d(4, 3))
    shape = (11, 9, 8)
    x = SparseTensor.from_dense(torch.randn(2, 2, *shape), random_mask(2, shape, occupancy))
    monkeypatch.setattr(product, "MIN_BLOCK_ROWS", 50)
    monkeypatch.setattr(product, "PLANNED_ROWS", 4)
    monkeypatch.setitem(product.BLOCK_ELEMENTS, "cpu", 1)
    asked = []

    def run() -> list[Tensor]:
        features = x.features.clone().requires_grad_()
        y = layer(x.replace(features)).features
        return [y, *torch.autograd.grad(y.square().sum(), [features, *layer.parameters()])]

    monkeypatch.setattr(product, "has_onednn", lambda: asked.append(True) or True)
    found = run()
    assert asked
    monkeypatch.setattr(product, "has_onednn", lambda: False)
    for ours, reference in zip(found, run(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)

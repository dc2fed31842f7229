"""Every engine equals native, and native equals dense, for all kinds of geometries; one checkpoint serves them all."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

from monai_memeff.sparse import SparseConv3d, SparseConvTranspose3d, SparseReLU, SparseTensor, backends
from monai_memeff.sparse.backends import registry
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from tests.sparse.backends.cases import (
    GEOMETRIES,
    TOLERANCES,
    assert_equals_native,
    convolution,
    random_tensors,
    results,
)
from tests.sparse.reference import DenseConv, assert_convolution_is_dense, random_mask

OTHERS = [name for name in registry.BACKENDS if name != "native"]


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> ModuleType:
    """An engine on the CPU; skipped with the reason where it is not usable."""
    reason = backends.status("cpu")[request.param]
    if reason:
        pytest.skip(reason)
    return importlib.import_module(registry.BACKENDS[request.param])


@pytest.fixture
def _chosen_engine() -> Iterator[None]:
    yield
    backends.use(None)


@pytest.mark.parametrize("engine", OTHERS, indirect=True)
@pytest.mark.parametrize("kind", list(GEOMETRIES))
@pytest.mark.slow
def test_an_engine_equals_native(engine: ModuleType, kind: str) -> None:
    assert_equals_native(engine, GEOMETRIES[kind]())


@pytest.mark.parametrize("engine", OTHERS, indirect=True)
@pytest.mark.parametrize("channels", [(1, 1), (1, 16), (16, 1), (33, 20)])
@pytest.mark.slow
def test_any_number_of_channels(engine: ModuleType, channels: tuple[int, int]) -> None:
    assert_equals_native(engine, convolution(3), channels)
    assert_equals_native(engine, convolution(2, 2), channels, bias=False)


@pytest.mark.parametrize("engine", ["native", *OTHERS], indirect=True)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.slow
def test_every_dtype(engine: ModuleType, dtype: torch.dtype) -> None:
    for kind in ("3^3", "2^3 stride 2", "2^3 back"):
        assert_equals_native(engine, GEOMETRIES[kind](), (8, 16), dtype)


@pytest.mark.parametrize("engine", OTHERS, indirect=True)
def test_gradients_of_what_is_asked_for_only(engine: ModuleType) -> None:
    geometry = convolution(3)
    features, weight, bias, cotangent = random_tensors(geometry, 3, 5)
    expected = results(engine, geometry, (features, weight, bias, cotangent))
    for part, wanted in (("features", 0), ("weight", 1), ("bias", 2)):
        tensors = [features.clone(), weight.clone(), bias.clone()]
        leaf = tensors[wanted].requires_grad_()
        (grad,) = torch.autograd.grad(engine.convolve(*tensors, geometry), [leaf], cotangent)
        torch.testing.assert_close(grad, expected[part], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(engine.convolve(features, weight, bias, geometry), expected["output"])


@pytest.mark.parametrize("engine", OTHERS, indirect=True)
@pytest.mark.slow
def test_features_and_weights_of_any_strides(engine: ModuleType) -> None:
    geometry = convolution(3)
    features, weight, bias, cotangent = random_tensors(geometry, 4, 6)
    expected = results(engine, geometry, (features, weight, bias, cotangent))
    turned = weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    sliced = torch.cat((features, features), 1)[:, :4]
    spread = cotangent[:1].expand_as(cotangent)
    out = engine.convolve(sliced.requires_grad_(), turned.requires_grad_(), bias, geometry)
    torch.testing.assert_close(out, expected["output"], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out, (sliced, turned), spread)
    same = results(engine, geometry, (features, weight, bias, spread.contiguous()))
    for grad, part in zip(grads, ("features", "weight"), strict=True):
        torch.testing.assert_close(grad, same[part], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_an_engine_equals_native_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    reason = backends.status("cuda")[name]
    if reason:
        pytest.skip(reason)
    if (name, dtype) == ("spconv", torch.float16):
        pytest.skip("its sums may be in float16")
    with torch.device("cuda"):
        for make in GEOMETRIES.values():
            for channels in ((3, 5), (16, 32)):
                assert_equals_native(importlib.import_module(registry.BACKENDS[name]), make(), channels, dtype)


def test_native_equals_dense() -> None:
    """The last link of the chain; every geometry of it is in tests/sparse/nn/test_conv.py."""
    sparse, dense = SparseConv3d(3, 4).double(), DenseConv(3, 4, 3)
    assert_convolution_is_dense(sparse, dense, random_mask(2, (5, 4, 6), 0.4))


def network() -> nn.Sequential:
    """Every kind of layer that engines compute."""
    return nn.Sequential(
        SparseConv3d(2, 8),
        SparseReLU(),
        SparseConv3d(8, 8, 2, 2),
        SparseConvTranspose3d(8, 8),
        SparseConvTranspose3d(8, 4, generative=True),
    )


@pytest.mark.parametrize("engine", OTHERS, indirect=True)
@pytest.mark.usefixtures("_chosen_engine")
def test_a_checkpoint_trained_on_one_engine_loads_on_the_others(engine: ModuleType) -> None:
    """The state dict has no trace of the engine, and gives the same results on each."""
    name = next(key for key, module in registry.BACKENDS.items() if module == engine.__name__)
    x = SparseTensor.from_dense(torch.randn(1, 2, 5, 4, 6), random_mask(1, (5, 4, 6), 0.4))
    for trained_on, loaded_on in ((name, "native"), ("native", name)):
        backends.use(trained_on)
        trained = network()
        optimizer = torch.optim.SGD(trained.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            trained(x).features.square().mean().backward()
            optimizer.step()
        expected = trained(x).features
        backends.use(loaded_on)
        loaded = network()
        loaded.load_state_dict(trained.state_dict(), strict=True)
        torch.testing.assert_close(loaded(x).features, expected, rtol=1e-4, atol=1e-5)


def test_spconv_on_the_cpu_is_refused_with_the_reason() -> None:
    reason = backends.status("cpu")["spconv"]
    assert reason is not None
    assert "wrong with two threads" in reason
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'spconv' cannot be used here: .*wrong with two threads.*Use 'native'"):
            backends.use("spconv")
    for name in ("spconv", "spconv_triton"):
        engine = importlib.import_module(registry.BACKENDS[name])
        geometry: ConvolutionGeometry = convolution(3)
        with pytest.raises(ValueError, match=r"for CUDA tensors only, got cpu.*Use the engine 'native'"):
            engine.convolve(*random_tensors(geometry, 3, 5)[:3], geometry)

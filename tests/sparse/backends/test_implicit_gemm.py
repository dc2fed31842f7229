"""spconv's tables from our kernel maps, and the calls, against a stand-in that asserts and computes its contract."""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Callable

import pytest
import torch

from monai_memeff.sparse import SparseConv3d, SparseTensor, backends
from monai_memeff.sparse.backends import implicit_gemm, native, registry
from monai_memeff.sparse.backends.self_test import self_test_error
from monai_memeff.sparse.core import kernel_map
from monai_memeff.sparse.core.fused import saved_for_recompute
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from tests.sparse.backends import stand_in
from tests.sparse.backends.cases import GEOMETRIES, assert_equals_native, convolution, random_tensors, results
from tests.sparse.reference import random_mask

KINDS = [kind for kind in GEOMETRIES if "5^3" not in kind and "4^3" not in kind]


@pytest.fixture
def engine() -> types.SimpleNamespace:
    """An engine with the stand-in for a library."""
    stand_in.calls.clear()
    return types.SimpleNamespace(convolve=lambda *arguments: implicit_gemm.convolve("stand-in", stand_in, *arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_say_what_our_maps_say(kind: str, engine: types.SimpleNamespace) -> None:
    geometry = GEOMETRIES[kind]()
    assert_equals_native(engine, geometry)
    assert len(stand_in.calls) == (0 if kind == "3^3 on nothing" else 1)


def test_half_precision(engine: types.SimpleNamespace) -> None:
    assert_equals_native(engine, convolution(3), (8, 16), torch.float16)


def test_masks_are_sorted_and_have_32_bits() -> None:
    for kind, kernel in (("3^3", 3), ("4x4x2", (4, 4, 2))):
        rows = implicit_gemm.rows_of(convolution(kernel, occupancy=1.0).kernel_map)
        unsigned = rows.mask[:, 0].long() & 0xFFFFFFFF
        assert bool((unsigned.diff() >= 0).all()), kind
        assert sorted(rows.order.tolist()) == list(range(len(rows.order)))
    assert int(unsigned.max()) == 2**32 - 1


def test_making_tables_leaves_the_map_alone() -> None:
    """A table of one column could be the map's own memory."""
    kernel_map = convolution(1, 2).kernel_map
    before = kernel_map.neighbor_rows().clone()
    implicit_gemm.rows_of(kernel_map)
    assert torch.equal(kernel_map.neighbor_rows(), before)


def test_tables_are_made_once(engine: types.SimpleNamespace) -> None:
    geometry = convolution(3)
    for _ in range(2):
        assert_equals_native(engine, geometry)
    first, second = stand_in.calls
    assert first.pair_fwd is second.pair_fwd
    assert first.pair_bwd is second.pair_bwd


def test_no_table_for_the_way_back_without_gradients(engine: types.SimpleNamespace) -> None:
    geometry = convolution(2, 2)
    with torch.no_grad():
        engine.convolve(*random_tensors(geometry, 3, 5)[:3], geometry)
    assert stand_in.calls[0].is_train is False
    assert "transposed" not in vars(geometry.kernel_map)


def test_weights_turn_output_channels_first() -> None:
    geometry = convolution((3, 1, 2))
    weight = torch.arange(6 * 4 * 5.0).view(6, 4, 5)
    turned = implicit_gemm.output_channels_first(weight, geometry)
    assert turned.shape == (5, 3, 1, 2, 4)
    assert torch.equal(turned[:, 2, 0, 1, :], weight[5].t())


def test_tables_made_in_inference_serve_training(engine: types.SimpleNamespace) -> None:
    """A set that is planned in validation may be trained on afterwards."""
    for kind in ("3^3", "2^3 stride 2", "1^3 stride 2", "2^3 back"):
        geometry = GEOMETRIES[kind]()
        with torch.inference_mode():
            engine.convolve(*random_tensors(geometry, 3, 5)[:3], geometry)
        assert_equals_native(engine, geometry)


def test_a_map_that_no_set_keeps_is_planned_once_a_call(
    engine: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry, planned = GEOMETRIES["2^3 onto a target"](), []
    plan = kernel_map.plan_kernel_map
    monkeypatch.setattr(kernel_map, "plan_kernel_map", lambda *sets: planned.append(sets) or plan(*sets))
    features, weight, bias, _ = random_tensors(geometry, 3, 5)
    engine.convolve(features.requires_grad_(), weight, bias, geometry)
    assert len(planned) == 1


def test_features_that_are_computed_again(engine: types.SimpleNamespace) -> None:
    """Saved tensors go through hooks, as they do in fused blocks; the tables among them come back as they were."""
    geometry, asked = convolution(3), []
    features, weight, bias, cotangent = random_tensors(geometry, 3, 5)
    expected = results(native, geometry, (features, weight, bias, cotangent))
    features.requires_grad_()
    with saved_for_recompute(features, lambda: asked.append(1) or features.detach()):
        out = engine.convolve(features, weight.requires_grad_(), bias, geometry)
    found = torch.autograd.grad(out, (features, weight), cotangent)
    assert asked
    for grad, part in zip(found, ("features", "weight"), strict=True):
        torch.testing.assert_close(grad, expected[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_under_autocast(
    dtype: torch.dtype, engine: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer has cast already; the libraries' own cast, always to float16, must not see autocast."""
    layer = SparseConv3d(3, 5)
    x = SparseTensor.from_dense(torch.randn(1, 3, 5, 4, 6), random_mask(1, (5, 4, 6), 0.4))
    expected = layer(x).features
    monkeypatch.setattr(backends, "current", lambda device: engine)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x).features
    assert out.dtype == dtype
    assert len(stand_in.calls) == (1 if dtype == torch.float16 else 0)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_the_self_test_passes_it(engine: types.SimpleNamespace) -> None:
    assert self_test_error(engine, torch.device("cpu")) is None
    assert len(stand_in.calls) == 3


@pytest.mark.parametrize("name", ["spconv", "spconv_triton"])
def test_an_adapter_takes_its_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usable where the import succeeds and the device is a GPU; calls go to the library's functions."""
    adapter, device = importlib.import_module(registry.BACKENDS[name]), torch.device("cuda")
    for module in (name, f"{name}.pytorch"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setitem(sys.modules, f"{name}.pytorch.functional", None)
    assert "install" in str(adapter.unavailable(device))
    monkeypatch.setitem(sys.modules, f"{name}.pytorch.functional", stand_in)
    monkeypatch.setattr(sys.modules[name], "pytorch", sys.modules[f"{name}.pytorch"], raising=False)
    monkeypatch.setattr(sys.modules[f"{name}.pytorch"], "functional", stand_in, raising=False)
    assert adapter.unavailable(device) is None
    monkeypatch.setattr(implicit_gemm, "convolve", lambda *arguments: arguments)
    features = types.SimpleNamespace(device=device)
    assert adapter.convolve(features, 1, 2, 3) == (name, stand_in, features, 1, 2, 3)


@pytest.mark.parametrize(
    ("make", "dtype", "reason"),
    [
        (lambda: convolution(4), torch.float32, r"kernels of more than 32 points, got \(4, 4, 4\)"),
        (lambda: convolution(3), torch.bfloat16, r"no kernels for torch\.bfloat16"),
        (lambda: convolution(3), torch.float64, r"no kernels for torch\.float64"),
    ],
)
def test_what_it_has_no_kernel_for_is_left_to_native_and_said_once(
    make: Callable[[], ConvolutionGeometry],
    dtype: torch.dtype,
    reason: str,
    engine: types.SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(implicit_gemm, "_logged", set())
    geometry = make()
    tensors = random_tensors(geometry, 3, 5, dtype)[:3]
    for _ in range(2):
        assert torch.equal(engine.convolve(*tensors, geometry), native.convolve(*tensors, geometry))
    assert not stand_in.calls
    assert len(caplog.messages) == 1
    assert re.search(reason, caplog.messages[0])


def test_addresses_beyond_32_bits_are_left_to_native(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = convolution(3)
    features, weight, _, _ = random_tensors(geometry, 3, 40)
    assert implicit_gemm.declined(features, weight, geometry) is None
    monkeypatch.setattr(implicit_gemm, "MAX_BYTES", 40 * len(features) * 4 - 1)
    assert "beyond 32-bit addresses" in str(implicit_gemm.declined(features, weight, geometry))
    assert implicit_gemm.declined(features.half(), weight, geometry) is None
    thin, few, _, _ = random_tensors(geometry, 1, 1)
    monkeypatch.setattr(implicit_gemm, "MAX_BYTES", 27 * len(features) * 4 - 1)
    assert "beyond 32-bit addresses" in str(implicit_gemm.declined(thin, few, geometry)), "the table has addresses too"

"""ocnn beyond parity: its own kernels in Triton's interpreter, their precision and blocks, and why it is refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_memeff.sparse.backends import ocnn as engine
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from tests.sparse.backends.cases import GEOMETRIES, assert_equals_native, back, convolution, random_tensors, results

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BLOCKS = {"B1": 64, "B2": 32, "BK": 32}
KERNELS = {
    "conv_fwd_implicit_gemm": "conv_fwd_implicit_gemm_kernel",
    "conv_fwd_implicit_gemm_splitk": "conv_fwd_implicit_gemm_splitk_kernel",
    "conv_bwd_implicit_gemm": "conv_bwd_weight_implicit_gemm_kernel",
    "conv_bwd_implicit_gemm_splitk": "conv_bwd_weight_implicit_gemm_splitk_kernel",
}


class InParts(dict):
    """What a tuner knows: every product in so many parts."""

    def __contains__(self, _: object) -> bool:
        return True

    def __getitem__(self, _: object) -> dict[str, int]:
        return {"SPLITK": 3}


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The engine with its kernels on CPU tensors; without a GPU they have no candidates for their blocks."""
    pytest.importorskip("ocnn", reason="pip install ocnn")
    triton = pytest.importorskip("triton", reason="Triton comes with the extra [triton], on Linux")
    from monai_memeff.sparse.backends.triton import kernels

    if not kernels.INTERPRETED:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    for module, name in KERNELS.items():
        kernel = getattr(engine.library(f"kernels.{module}"), name)
        larger = triton.Config({**BLOCKS, "B1": 128}, num_warps=2)
        monkeypatch.setattr(kernel, "configs", [larger, triton.Config(BLOCKS, num_warps=2)])

    def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
        result = engine._Convolution.apply(features, weight, geometry.kernel_map, True)
        return result if bias is None else result + bias

    try:
        convolve(*random_tensors(GEOMETRIES["3^3 on one voxel"](), 1, 1)[:3], GEOMETRIES["3^3 on one voxel"]())
    except triton.runtime.errors.InterpreterError:
        pytest.skip(f"Triton {triton.__version__} and numpy {np.__version__}: the interpreter cannot run a loop")
    return SimpleNamespace(convolve=convolve)


KINDS = ("3^3", "3^3 on one voxel", "3^3 stride 2", "3x1x2 stride 1x2x2 dilated", "2^3 back", "4^3 generative")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_kernels_equal_native(by_kernels: types.ModuleType, kind: str) -> None:
    assert_equals_native(by_kernels, GEOMETRIES[kind]())


@pytest.mark.slow
def test_the_kernels_take_any_channels_and_half_precision(by_kernels: types.ModuleType) -> None:
    assert_equals_native(by_kernels, convolution(3), (33, 20))
    assert_equals_native(by_kernels, back(2), (8, 16), torch.float16)


@pytest.mark.slow
def test_many_rows_take_the_tuned_kernels(by_kernels: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from ocnn.nn import kernels

    monkeypatch.setattr(engine, "TUNED_ROWS", 0)
    tuned = sys.modules["ocnn.nn.kernels.conv_bwd_implicit_gemm_splitk"].conv_bwd_weight_implicit_gemm_splitk
    for product in (kernels.conv_fwd_implicit_gemm_splitk, tuned):
        monkeypatch.setattr(product, "cache", InParts())
    for module in KERNELS:
        kernel = getattr(engine.library(f"kernels.{module}"), KERNELS[module])
        monkeypatch.setattr(kernel, "configs", kernel.configs[1:])
    assert_equals_native(by_kernels, convolution(3))
    assert_equals_native(by_kernels, convolution(2, 2), (5, 3))


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_torchs_switch(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ocnn", reason="pip install ocnn")
    config = engine.library("kernels.config")
    monkeypatch.setattr(config, "allow_tf32", not allowed)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
    with engine._precision():
        assert config.allow_tf32 is allowed
    assert config.allow_tf32 is not allowed


def test_buffers_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the rows at a time; a few large rows are one part."""
    if engine.unavailable(CPU):
        pytest.skip(str(engine.unavailable(CPU)))
    for geometry in (convolution(3, occupancy=1.0), back(3)):
        tensors = random_tensors(geometry, 3, 5, torch.float64)
        whole = results(engine, geometry, tensors)
        for numbers in (1, 27 * 3 * 30):
            monkeypatch.setattr(engine, "BUFFER", numbers)
            for part, found in results(engine, geometry, tensors).items():
                torch.testing.assert_close(found, whole[part], rtol=1e-12, atol=1e-12)


def importing(version: str | None) -> Callable[[str], types.ModuleType]:
    """What importing parts of the library gives where Triton is missing, or all of it is there."""

    def library(part: str) -> types.ModuleType:
        if version is None and part == "kernels":
            raise ModuleNotFoundError("No module named 'triton'")
        return types.ModuleType(part)

    return library


def test_it_says_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ocnn", None)
    assert "pip install 'ocnn>=2.3'" in str(engine.unavailable(CPU))
    assert engine.unavailable(torch.device("mps")) == "ocnn has no kernels for mps tensors"
    for version, reason in (("2.2.9", "ocnn 2.2.9 is older than 2.3"), ("2.10.0", None), ("3.0", None)):
        monkeypatch.setitem(sys.modules, "ocnn", SimpleNamespace(__version__=version))
        monkeypatch.setattr(engine, "library", importing(version))
        found = engine.unavailable(CUDA)
        assert found is None if reason is None else reason in str(found)
    monkeypatch.setattr(engine, "library", importing(None))
    assert "No module named 'triton'" in str(engine.unavailable(CUDA))
    assert engine.unavailable(CPU) is None, "its products in torch need no Triton"


def test_native_computes_what_the_kernels_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = convolution(3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    for dtype, reason in (
        (torch.float64, "no kernels for torch.float64"),
        (torch.bfloat16, "bfloat16 needs compute capability 8.0"),
        (torch.float32, None),
        (torch.float16, None),
    ):
        assert engine.declined(*random_tensors(geometry, 3, 5, dtype)[:2], geometry) == reason
    monkeypatch.setattr(engine, "MAX_BYTES", 27 * len(geometry.inputs) - 1)
    assert "beyond 32-bit addresses" in str(engine.declined(*random_tensors(geometry, 3, 5)[:2], geometry))

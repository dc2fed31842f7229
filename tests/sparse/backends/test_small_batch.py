"""Few rows with many weights: the same convolution by another route, against the usual one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_memeff.sparse import SparseConv3d, SparseConvTranspose3d, SparseTensor
from monai_memeff.sparse.backends.native import product
from monai_memeff.sparse.backends.native import small_batch as few
from monai_memeff.sparse.core import neighbors
from monai_memeff.sparse.core.voxel_set import VoxelSet
from tests.sparse.reference import random_mask

SHAPE = (7, 6, 9)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 2), (3, 2), ((1, 3, 5), 1), (4, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("occupancy", [0.01, 0.05])
@pytest.mark.parametrize("full", [0, 2**20], ids=["looked up", "every cell a slot"])
def test_the_same_values_and_gradients(
    kernel: int, stride: int, bias: bool, occupancy: float, full: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "FULL_CELLS", full)
    mask = random_mask(2, SHAPE, occupancy)
    mask[0, 0, 3, 3, 4] = True
    x = SparseTensor.from_dense(torch.randn(2, 3, *SHAPE).double(), mask)
    layer = SparseConv3d(3, 2 * len(x), kernel, stride, bias=bias).double()
    assert_same_by_both_routes(layer, x, x.features, monkeypatch)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (4, 2), (3, 1), (3, 2), ((1, 2, 4), 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("goal", ["generated", "known", "given"])
def test_transposed_has_the_same_values_and_gradients(
    kernel: int, stride: int, bias: bool, goal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = SparseTensor.from_dense(torch.randn(2, 1, *SHAPE).double(), random_mask(2, SHAPE, 0.05))
    coarse = fine.on(fine.voxels if stride == 1 else fine.voxels.coarsened((2, 2, 2)), fine.features)
    features = torch.randn(len(coarse.voxels), 2 * len(fine)).double()
    layer = SparseConvTranspose3d(2 * len(fine), 3, kernel, stride, bias=bias, generative=goal == "generated").double()
    other = SparseTensor.from_dense(torch.ones(2, 1, *SHAPE).double(), random_mask(2, SHAPE, 0.1))
    arguments = (other,) if goal == "given" else ()
    assert_same_by_both_routes(layer, coarse, features, monkeypatch, *arguments)


@pytest.mark.parametrize("transposed", [False, True])
def test_low_precision(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = SparseTensor.from_dense(torch.randn(1, 9, *SHAPE), random_mask(1, SHAPE, 0.05))
    channels = len(fine)
    layer = SparseConvTranspose3d(channels, 9, 2) if transposed else SparseConv3d(9, channels)
    cells = fine.voxels.coarsened((2, 2, 2))
    x = SparseTensor.on(cells, torch.randn(len(cells), channels)) if transposed else fine
    outputs = []
    for applies in (few.applies, lambda *_: False):
        monkeypatch.setattr(few, "applies", applies)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(layer(x).features)
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("transposed", [False, True])
def test_few_rows_of_very_many_weights(rows: int, transposed: bool) -> None:
    """In float32 oneDNN multiplies them, also where the rows are fewer than the kernel's points; float64 is torch's."""
    channels = 144
    cells = VoxelSet(torch.arange(rows) * 2, (3, 3, 3), 1)
    layer = SparseConvTranspose3d(channels, 64, 4, generative=True) if transposed else SparseConv3d(channels, channels)
    assert layer.weight.numel() >= product.WIDE_ELEMENTS

    def run(dtype: torch.dtype) -> list[Tensor]:
        layer.to(dtype)
        given = torch.randn(rows, channels, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        y = layer(SparseTensor.on(cells, given)).features
        return [y, *torch.autograd.grad(y.square().sum(), [given, *layer.parameters()])]

    for ours, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.detach().abs().max()))


def assert_same_by_both_routes(
    layer: torch.nn.Module, x: SparseTensor, features: Tensor, monkeypatch: pytest.MonkeyPatch, *arguments: SparseTensor
) -> None:
    """Values and gradients of the layer with few rows, and with that route closed."""
    calls: list[int] = []
    route = few.both_gradients
    monkeypatch.setattr(few, "both_gradients", lambda *arguments: calls.append(1) or route(*arguments))

    def run() -> list[Tensor]:
        given = features.clone().requires_grad_()
        y = layer(SparseTensor.on(x.voxels, given), *arguments).features
        return [y, *torch.autograd.grad(y.square().sum(), [given, *layer.parameters()])]

    found = run()
    assert calls
    monkeypatch.setattr(few, "applies", lambda *_: False)
    for ours, usual in zip(found, run(), strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-10, atol=1e-10)
    assert len(calls) == 1


def test_second_derivatives_of_few_rows() -> None:
    x = SparseTensor.from_dense(torch.randn(1, 2, 3, 3, 3).double(), random_mask(1, (3, 3, 3), 0.2))
    layer = SparseConv3d(2, 2 * len(x)).double()

    def run(features: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x.replace(features),)).features

    inputs = (x.features.clone().requires_grad_(), layer.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)

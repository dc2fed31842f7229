"""Few rows with many weights: the same convolution by another route, against the usual one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_memeff.sparse import SparseConv3d, SparseTensor
from monai_memeff.sparse.backends.native import few
from tests.sparse.reference import random_mask

SHAPE = (7, 6, 9)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 2), (3, 2), ((1, 3, 5), 1), (4, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("occupancy", [0.01, 0.05])
def test_the_same_values_and_gradients(
    kernel: int, stride: int, bias: bool, occupancy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = random_mask(2, SHAPE, occupancy)
    mask[0, 0, 3, 3, 4] = True
    x = SparseTensor.from_dense(torch.randn(2, 3, *SHAPE).double(), mask)
    layer = SparseConv3d(3, 2 * len(x), kernel, stride, bias=bias).double()
    calls: list[int] = []
    route = few.both_gradients
    monkeypatch.setattr(few, "both_gradients", lambda *arguments: calls.append(1) or route(*arguments))

    def run() -> list[Tensor]:
        features = x.features.clone().requires_grad_()
        y = layer(x.replace(features)).features
        return [y, *torch.autograd.grad(y.square().sum(), [features, *layer.parameters()])]

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

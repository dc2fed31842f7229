"""Sparse convolutions of every kind equal dense ones on zero-filled volumes: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from monai_memeff.sparse import SparseConv3d, SparseConvTranspose3d, SparseTensor
from tests.oracles import TOLERANCES, assert_adjoint, assert_less_memory, asymmetric
from tests.sparse.reference import (
    DenseConv,
    DenseConvTranspose,
    Size,
    assert_convolution_is_dense,
    assert_generative_is_dense,
    assert_transposed_is_dense,
    fine_and_coarse,
    mask_of,
    random_mask,
    shuffled_rows,
)

KERNELS: list[Size] = [1, 2, 3, 4, 5, (3, 1, 2)]
GEOMETRIES: list[tuple[Size, Size, Size]] = [
    *product(KERNELS, [1, 2, 3, (1, 2, 2)], [1]),
    *product(KERNELS[1:], [1], [2, 3]),
    (3, 2, 2),
    (2, 3, 3),
    (4, (1, 2, 2), (1, 3, 2)),
    ((3, 1, 2), 3, (1, 3, 2)),
]
SHAPE = (7, 6, 9)
BATCH = 3

Threads = Callable[[int], None]


def masks() -> dict[str, Tensor]:
    """A batch with an empty item, one voxel in a corner, nothing, everything."""
    corner = torch.zeros(BATCH, 1, *SHAPE, dtype=torch.bool)
    corner[1, 0, -1, 0, -1] = True
    return {
        "partial": random_mask(BATCH, SHAPE, 0.3, empty_item=1),
        "corner": corner,
        "empty": torch.zeros_like(corner),
        "full": torch.ones_like(corner),
    }


def check_masks(threads: Threads, check: Callable[[Tensor], None]) -> None:
    """Run a check on every mask, on the partial one at 1 and at 2 threads."""
    for name, mask in masks().items():
        for number in (1, 2) if name == "partial" else (1,):
            threads(number)
            check(mask)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), GEOMETRIES)
@pytest.mark.slow
def test_convolution(kernel: Size, stride: Size, dilation: Size, threads: Threads) -> None:
    sparse = SparseConv3d(3, 4, kernel, stride, dilation).double()
    dense = DenseConv(3, 4, kernel, stride, dilation)
    check_masks(threads, lambda mask: assert_convolution_is_dense(sparse, dense, mask))


@pytest.mark.parametrize(("kernel", "stride", "dilation"), GEOMETRIES)
@pytest.mark.slow
def test_transposed_onto_the_finer_voxels(kernel: Size, stride: Size, dilation: Size, threads: Threads) -> None:
    sparse = SparseConvTranspose3d(3, 4, kernel, stride, dilation).double()
    dense = DenseConvTranspose(3, 4, kernel, stride, dilation)
    check_masks(threads, lambda mask: assert_transposed_is_dense(sparse, dense, mask))


@pytest.mark.parametrize(("kernel", "stride", "dilation"), GEOMETRIES)
def test_transposed_onto_a_target(kernel: Size, stride: Size, dilation: Size) -> None:
    sparse = SparseConvTranspose3d(3, 4, kernel, stride, dilation).double()
    dense = DenseConvTranspose(3, 4, kernel, stride, dilation)
    target = random_mask(BATCH, SHAPE, 0.5, empty_item=0)
    assert_transposed_is_dense(sparse, dense, masks()["partial"], target)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), GEOMETRIES)
@pytest.mark.slow
def test_generative(kernel: Size, stride: Size, dilation: Size, threads: Threads) -> None:
    for padding in (None, 0):
        sparse = SparseConvTranspose3d(3, 4, kernel, stride, dilation, generative=True, padding=padding).double()
        dense = DenseConvTranspose(3, 4, kernel, stride, dilation, padding)
        for number, occupancy in ((1, 0.2), (2, 0.2), (1, 1.0), (1, 0.0)):
            threads(number)
            assert_generative_is_dense(sparse, dense, random_mask(BATCH, (3, 2, 4), occupancy, empty_item=2))


def test_generative_keeps_the_odd_extents_it_came_from() -> None:
    _, coarse = fine_and_coarse(random_mask(2, SHAPE, 0.2), 2)
    x = SparseTensor.on(coarse, torch.ones(len(coarse), 1))
    made = SparseConvTranspose3d(1, 1, 2, generative=True)(x)
    assert (made.spatial_shape, made.stride) == (SHAPE, (1, 1, 1))
    dense = DenseConvTranspose(1, 1, 2)
    assert torch.equal(mask_of(made), dense.reach(mask_of(coarse), SHAPE))


def test_rows_in_any_order_give_the_same() -> None:
    x = SparseTensor.from_dense(asymmetric((BATCH, 3, *SHAPE)), masks()["partial"])
    other = shuffled_rows(x)
    for layer in (SparseConv3d(3, 4), SparseConv3d(3, 4, 2, 2), SparseConvTranspose3d(3, 4, generative=True)):
        ours, theirs = layer.double()(x), layer(other)
        assert torch.equal(ours.coordinates, theirs.coordinates)
        assert torch.equal(ours.features, theirs.features)


@pytest.mark.parametrize(
    "layer", [SparseConv3d(3, 4, 3), SparseConv3d(3, 4, 2, 2), SparseConvTranspose3d(3, 4, 3, generative=True)]
)
def test_adjoint(layer: torch.nn.Module) -> None:
    """<F x, y> == <x, F* y> in the features, and as well in the weights."""
    x = SparseTensor.from_dense(asymmetric((2, 3, *SHAPE)), random_mask(2, SHAPE, 0.3))
    layer = layer.double()
    layer.bias.data.zero_()
    shape = layer(x).features.shape
    assert_adjoint(
        lambda f: layer(x.replace(f)).features, None, torch.randn_like(x.features), torch.randn(shape).double()
    )

    def in_weights(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).features

    assert_adjoint(in_weights, None, torch.randn_like(layer.weight), torch.randn(shape).double())


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads(threads: Threads) -> None:
    """Forward and backward, on a set that is large enough for many blocks."""
    mask = random_mask(1, (48, 40, 44), 0.3)
    x = SparseTensor.from_dense(torch.randn(1, 16, *mask.shape[2:]).double(), mask)
    layers = [
        SparseConv3d(16, 16),
        SparseConv3d(16, 24, 2, 2),
        SparseConvTranspose3d(24, 16, 2),
        SparseConv3d(16, 8, 1),
    ]
    net = torch.nn.Sequential(*layers).double()
    found = []
    for number in (1, 2):
        threads(number)
        features = x.features.clone().requires_grad_()
        y = net(x.replace(features)).features
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [features, *net.parameters()])])
    for one, two in zip(*found, strict=True):
        assert float((one - two).abs().max()) <= 1e-13 * float(one.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    mask = random_mask(2, SHAPE, 0.4)
    x = SparseTensor.from_dense(torch.randn(2, 8, *SHAPE), mask)
    net = torch.nn.Sequential(
        SparseConv3d(8, 8), SparseConv3d(8, 8, 3, 2), SparseConvTranspose3d(8, 8), SparseConv3d(8, 4, 1)
    )
    found = []
    for enabled in (False, True):
        features = x.features.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            y = net(x.replace(features)).features
        assert y.dtype == (dtype if enabled else torch.float32)
        grads = torch.autograd.grad(y.float().square().sum(), [features, *net.parameters()])
        assert all(grad.dtype == torch.float32 for grad in grads)
        found.append([y.detach().float(), *grads])
    rtol, atol = TOLERANCES[dtype]
    for exact, rough in zip(*found, strict=True):
        assert float((exact - rough).abs().max()) <= atol + rtol * float(exact.abs().max())


def test_float32_weights_take_half_features() -> None:
    x = SparseTensor.from_dense(torch.randn(1, 2, *SHAPE), random_mask(1, SHAPE, 0.4)).to(dtype=torch.bfloat16)
    layer = SparseConv3d(2, 3)
    y = layer(x).features
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_second_derivatives() -> None:
    x = SparseTensor.from_dense(torch.randn(1, 2, 3, 3, 3).double(), random_mask(1, (3, 3, 3), 0.5))
    for layer in (SparseConv3d(2, 2).double(), SparseConv3d(2, 2, 2, 2).double()):
        inputs = (x.features.clone().requires_grad_(), layer.weight.detach().clone().requires_grad_())

        def call(features: Tensor, weight: Tensor, layer: torch.nn.Module = layer) -> Tensor:
            return torch.func.functional_call(layer, {"weight": weight}, (x.replace(features),)).features

        torch.autograd.gradgradcheck(call, inputs)


def test_gradients_of_what_is_asked_for_only() -> None:
    """Frozen features or frozen weights take other paths than both together, to the same values."""
    x = SparseTensor.from_dense(asymmetric((2, 3, *SHAPE)), random_mask(2, SHAPE, 0.3))
    for layer in (SparseConv3d(3, 4).double(), SparseConv3d(3, 4, 2, 2).double()):
        features = x.features.clone().requires_grad_()
        both = torch.autograd.grad(layer(x.replace(features)).features.square().sum(), [features, layer.weight])
        weights_only = torch.autograd.grad(layer(x).features.square().sum(), [layer.weight])
        layer.requires_grad_(False)
        features_only = torch.autograd.grad(layer(x.replace(features)).features.square().sum(), [features])
        torch.testing.assert_close(both[0], features_only[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both[1], weights_only[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_training_step_takes_less_memory_than_dense() -> None:
    mask = random_mask(1, (40, 40, 40), 0.03)
    image = torch.randn(1, 16, 40, 40, 40)
    sparse = torch.nn.Sequential(*[SparseConv3d(16, 16) for _ in range(3)])
    dense = torch.nn.Sequential(*[torch.nn.Conv3d(16, 16, 3, padding=1) for _ in range(3)])
    x = SparseTensor.from_dense(image, mask)
    assert_less_memory(
        lambda: sparse(SparseTensor(x.features, x.coordinates, x.spatial_shape)).features.sum().backward(),
        lambda: dense(image).sum().backward(),
        ratio=0.2,
    )


def test_bad_calls_are_refused() -> None:
    x = SparseTensor.from_dense(torch.randn(1, 2, *SHAPE), random_mask(1, SHAPE, 0.4))
    with pytest.raises(ValueError, match="expects 3 channels, got 2"):
        SparseConv3d(3, 4)(x)
    with pytest.raises(TypeError, match=r"takes a SparseTensor, got Tensor; use SparseTensor\.from_dense"):
        SparseConv3d(2, 4)(torch.zeros(1, 2, 3, 3, 3))
    with pytest.raises(ValueError, match=r"knows no finer voxels.*Pass target"):
        SparseConvTranspose3d(2, 2)(x)
    with pytest.raises(ValueError, match="call it without a target"):
        SparseConvTranspose3d(2, 2, generative=True)(x, x)


def test_parameters_are_those_of_torch() -> None:
    for ours, theirs in (
        (SparseConv3d(3, 5, (3, 1, 2), 2), torch.nn.Conv3d(3, 5, (3, 1, 2), 2)),
        (SparseConvTranspose3d(3, 5, 2, 2, bias=False), torch.nn.ConvTranspose3d(3, 5, 2, 2, bias=False)),
    ):
        shapes = [(name, tuple(p.shape)) for name, p in theirs.named_parameters()]
        assert [(name, tuple(p.shape)) for name, p in ours.named_parameters()] == shapes
        ours.load_state_dict(theirs.state_dict(), strict=True)

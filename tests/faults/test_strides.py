"""Grids that do not fit: refused wherever sets of voxels meet, and what fits equals torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import UNet
from torch import nn
from torch.nn import functional as F

from monai_memeff.sparse import (
    SparseCompletionLoss,
    SparseCompletionNet,
    SparseConv3d,
    SparseConvTranspose3d,
    SparseInferer,
    SparseMaxPool3d,
    SparseTensor,
    concatenate_channels,
    to_sparse,
    union_add,
)

QUICK = settings(max_examples=60)
EXTENTS = st.tuples(*[st.integers(1, 9)] * 3)
STEPS = st.tuples(*[st.integers(1, 4)] * 3)


def full(shape: tuple[int, ...], channels: int = 1, batch: int = 1) -> SparseTensor:
    """Every voxel active."""
    return SparseTensor.from_dense(torch.randn(batch, channels, *shape), torch.ones(batch, 1, *shape).bool())


@QUICK
@given(shape=EXTENTS, down=STEPS, up=STEPS, pooled=st.booleans())
def test_a_transposed_convolution_goes_back_by_the_stride_that_came_or_is_refused(
    shape: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...], pooled: bool
) -> None:
    x = full(shape)
    coarse = (SparseMaxPool3d(down, down) if pooled else SparseConv3d(1, 1, down, down))(x)
    layer = SparseConvTranspose3d(1, 1, up, up)
    stays = down == (1, 1, 1)
    if (up == down) or (stays and up == down):
        assert layer(coarse).spatial_shape == shape
        return
    if up == (1, 1, 1):
        assert layer(coarse).voxels is coarse.voxels
        return
    with pytest.raises(ValueError, match=r"transposed convolution of stride|knows no finer voxels"):
        layer(coarse)
    with pytest.raises(ValueError, match=r"onto the target .* takes an input of"):
        layer(coarse, x)


@QUICK
@given(shape=EXTENTS, other=EXTENTS, batch=st.integers(1, 2))
def test_a_target_of_another_extent_or_batch_is_refused(
    shape: tuple[int, ...], other: tuple[int, ...], batch: int
) -> None:
    coarse, target = SparseConv3d(1, 2, 2, 2)(full(shape)), full(other, batch=batch)
    fits = batch == 1 and all(-(-a // 2) == -(-b // 2) for a, b in zip(shape, other, strict=True))
    layer = SparseConvTranspose3d(2, 1, 2, 2)
    if fits:
        expected = F.conv_transpose3d(coarse.dense(), layer.weight, layer.bias, 2)
        crop = tuple(slice(extent) for extent in other)
        torch.testing.assert_close(layer(coarse, target).dense(), expected[(..., *crop)])
    else:
        with pytest.raises(ValueError, match="takes an input of"):
            layer(coarse, target)


def test_sums_and_concatenations_of_other_grids_are_refused() -> None:
    x, y = full((4, 4, 4)), SparseConv3d(1, 1, 2, 2)(full((8, 8, 8)))
    assert x.spatial_shape == y.spatial_shape
    for join in (union_add, lambda a, b: concatenate_channels([a, b])):
        with pytest.raises(ValueError, match="must share one grid"):
            join(x, y)


def test_generative_layers_refine_what_their_stride_divides() -> None:
    coarse = SparseConv3d(1, 1, 3, 3)(full((9, 9, 9)))
    with pytest.raises(ValueError, match="refines inputs whose stride is a multiple of it, or 1, got"):
        SparseConvTranspose3d(1, 1, 2, 2, generative=True)(coarse)
    finer = SparseConvTranspose3d(1, 1, 2, 2, generative=True)(full((3, 4, 5)))
    assert finer.spatial_shape == (6, 8, 10)


@settings(max_examples=150)
@given(
    kernel=st.integers(1, 5), stride=st.integers(1, 4), padding=st.integers(0, 3), dilation=st.integers(1, 2),
    end=st.integers(0, 3), transposed=st.booleans(), cells=st.integers(1, 3), even=st.booleans(),
)  # fmt: skip
def test_to_sparse_keeps_the_grid_that_torch_makes_or_refuses(
    kernel: int, stride: int, padding: int, dilation: int, end: int, transposed: bool, cells: int, even: bool
) -> None:
    """Wherever torch's extents differ from n -> ceil(n / stride) and back, the layer is refused, and nothing else."""
    end = end % stride if transposed else 0
    if transposed:
        dense: nn.Module = nn.ConvTranspose3d(1, 1, kernel, stride, padding, end, dilation=dilation)
    else:
        dense = nn.Conv3d(1, 1, kernel, stride, padding, dilation)
    large = cells * stride
    probe = torch.randn(1, 1, *[max(large, 16 * stride)] * 3) if not transposed else torch.randn(1, 1, *[16] * 3)
    made = dense(probe).shape[2]
    keeps = made == -(-probe.shape[2] // stride) if not transposed else 16 * stride - stride < made <= 16 * stride
    copy = type(dense).__new__(type(dense))
    copy.__dict__ = {**dense.__dict__}
    if not keeps:
        with pytest.raises(ValueError, match=r"padding"):
            to_sparse(copy)
        return
    twin = to_sparse(copy)
    if not transposed:
        x = full((large, large, large))
        torch.testing.assert_close(twin(x).dense(), dense(x.dense()))


def test_the_example_of_a_strided_convolution_without_padding() -> None:
    with pytest.raises(ValueError, match="kernel 3 with padding 0"):
        to_sparse(nn.Sequential(nn.Conv3d(1, 1, 3, 2)))


def test_a_whole_unet_is_refused_with_the_way() -> None:
    network = UNet(3, 1, 2, (2, 4), (2,))
    with pytest.raises(TypeError, match=r"SparseUNet with the same arguments, .*: to_sparse\(unet.model\)"):
        to_sparse(network)
    assert to_sparse(network.model)(full((4, 4, 4))).spatial_shape == (4, 4, 4)


@QUICK
@given(shape=EXTENTS, other=EXTENTS, batch=st.integers(1, 2))
@pytest.mark.slow
def test_the_completion_network_and_its_loss_take_targets_of_their_grid_only(
    shape: tuple[int, ...], other: tuple[int, ...], batch: int
) -> None:
    x, target = torch.ones(1, 1, *shape), torch.ones(batch, 1, *other)
    net = SparseCompletionNet((1,) * 7)
    if target.shape == x.shape:
        SparseCompletionLoss()(net(x, target), target)
        return
    with pytest.raises(ValueError, match="must lie on the grid of the input"):
        net(x, target)
    with pytest.raises(ValueError, match="does not lie on the grid of the logits"):
        SparseCompletionLoss()(net(x, x), target)


def test_an_output_on_another_grid_does_not_get_the_inputs_space() -> None:
    class Finer(nn.Module):
        """Doubles the resolution."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = SparseConvTranspose3d(1, 1, 2, 2, generative=True)

        def sparsify(self, volume: torch.Tensor) -> SparseTensor:
            """All voxels."""
            return SparseTensor.from_dense(volume, torch.ones_like(volume).bool())

        def densify(self, x: SparseTensor) -> torch.Tensor:
            """Zeros elsewhere."""
            return x.dense()

        def forward(self, x: SparseTensor) -> SparseTensor:
            """Twice as many voxels along every axis."""
            return self.layer(x)

    with pytest.raises(ValueError, match=r"on a grid of \(4, 6, 8\), the volume has \(2, 3, 4\)"):
        SparseInferer()(torch.randn(1, 1, 2, 3, 4), Finer())

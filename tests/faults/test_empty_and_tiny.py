"""Empty and tiny: every layer and network at every extent from 1 up, on no voxel, and after everything is pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff import norms
from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.occupancy import OccupancyLoss, OccupancyNet, OctreeInferer
from monai_memeff.sparse import (
    CoarseToSparseUNet,
    SparseAvgPool3d,
    SparseBatchNorm3d,
    SparseCompletionLoss,
    SparseCompletionNet,
    SparseConv3d,
    SparseConvTranspose3d,
    SparseDropout3d,
    SparseGlobalAvgPool3d,
    SparseGroupNorm,
    SparseInferer,
    SparseInstanceNorm3d,
    SparseLeakyReLU,
    SparseMaxPool3d,
    SparsePReLU,
    SparseReLU,
    SparseTensor,
    SparseUNet,
    concatenate_channels,
    union_add,
)

EXTENTS = st.tuples(*[st.integers(1, 6)] * 3)
FILL = st.sampled_from([0.0, 0.05, 0.5, 1.0])
NORMS = st.sampled_from(["instance", "batch", ("group", {"num_groups": 2})])
KERNEL = st.tuples(*[st.integers(1, 4)] * 3)


def some(shape: tuple[int, ...], fill: float, channels: int = 2, batch: int = 2) -> Tensor:
    """A volume of which a share of the voxels is not zero."""
    return torch.randn(batch, channels, *shape) * (torch.rand(batch, 1, *shape) < fill)


def sparse(shape: tuple[int, ...], fill: float) -> SparseTensor:
    """Such a volume's voxels, with two channels, which want a gradient."""
    torch.manual_seed(sum(shape))
    volume = some(shape, fill).requires_grad_()
    return SparseTensor.from_dense(volume, (volume != 0).any(1, keepdim=True))


def run_back(*outputs: Tensor) -> None:
    """Go backward through finite outputs."""
    assert all(bool(y.isfinite().all()) for y in outputs)
    sum((y * y).sum() for y in outputs).backward()


# Layers


@settings(max_examples=80)
@given(
    shape=EXTENTS, fill=FILL, kernel=KERNEL, stride=KERNEL, dilation=st.integers(1, 2), prune=st.booleans(),
    transposed=st.booleans(),
)  # fmt: skip
def test_convolutions_to_known_voxels_equal_torch(
    shape: tuple[int, ...], fill: float, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: int, prune: bool,
    transposed: bool,
) -> None:  # fmt: skip
    """Overlapping and gapped kernels on any set, on none, and on one of which everything was pruned."""
    x = sparse(shape, fill)
    if transposed:
        down = SparseConv3d(2, 2, 1, stride)(x)
        down = down.prune(torch.zeros(len(down), dtype=torch.bool)) if prune else down
        layer = SparseConvTranspose3d(2, 3, kernel, stride, dilation)
        y = layer(down)
        assert y.voxels is (x.voxels if stride != (1, 1, 1) else down.voxels)
        padding = [d * (k - 1) // 2 for k, d in zip(kernel, (dilation,) * 3, strict=True)]
        grown = F.conv_transpose3d(down.dense(), layer.weight, layer.bias, stride, 0, 0, 1, dilation)
        crops = tuple(slice(p, None) for p in padding)
        expected = F.pad(grown, [n for _ in range(3) for n in (0, 20)])[(..., *crops)]
        reached = F.pad(torch.ones_like(grown), [n for _ in range(3) for n in (0, 20)])[(..., *crops)]
        if len(y):
            b, i, j, k = y.coordinates.unbind(1)
            bias = layer.bias[None]
            rows = torch.where(reached[b, :, i, j, k] > 0, expected[b, :, i, j, k], bias)
            torch.testing.assert_close(y.features, rows)
    else:
        x = x.prune(torch.zeros(len(x), dtype=torch.bool)) if prune else x
        y = SparseConv3d(2, 3, kernel, stride, dilation)(x)
        assert len(y) == (len(x) if stride == (1, 1, 1) else len(x.voxels.coarsened(stride)))
    run_back(y.features)


@settings(max_examples=80)
@given(shape=EXTENTS, fill=FILL, kernel=KERNEL, stride=KERNEL, padding=st.integers(0, 5), prune=st.booleans())
def test_generative_layers_create_what_they_reach_even_if_that_is_nothing(
    shape: tuple[int, ...], fill: float, kernel: tuple[int, ...], stride: tuple[int, ...], padding: int, prune: bool
) -> None:
    x = sparse(shape, fill)
    x = x.prune(torch.zeros(len(x), dtype=torch.bool)) if prune else x
    layer = SparseConvTranspose3d(2, 1, kernel, stride, generative=True, padding=padding)
    y = layer(x)
    assert y.spatial_shape == tuple(n * s for n, s in zip(shape, stride, strict=True))
    ones = torch.zeros(2, 1, *shape).masked_fill(SparseTensor.on(x.voxels, x.features[:, :1] * 0 + 1).dense() > 0, 1)
    reached = F.conv_transpose3d(ones, torch.ones(1, 1, *kernel), stride=stride)
    grid = F.pad(reached, [n for _ in range(3) for n in (0, 30)])[..., padding:, padding:, padding:]
    expected = int((grid[(..., *(slice(n) for n in y.spatial_shape))] > 0).sum())
    assert len(y) == expected
    run_back(y.features, SparseConv3d(1, 1)(y).features)


def test_a_generative_layer_that_reaches_nothing_from_something() -> None:
    x = SparseTensor(torch.ones(1, 2, requires_grad=True), torch.tensor([[0, 0, 1, 0]]), (1, 4, 1))
    y = SparseConvTranspose3d(2, 1, 3, (1, 4, 1), generative=True, padding=4)(x)
    assert (len(y), y.spatial_shape) == (0, (1, 16, 1))
    run_back(y.features, SparseConv3d(1, 1)(y).features)


@settings(max_examples=60)
@given(shape=EXTENTS, fill=FILL, kernel=KERNEL, stride=KERNEL, maximum=st.booleans())
def test_pooling(
    shape: tuple[int, ...], fill: float, kernel: tuple[int, ...], stride: tuple[int, ...], maximum: bool
) -> None:
    y = (SparseMaxPool3d if maximum else SparseAvgPool3d)(kernel, stride)(sparse(shape, fill))
    run_back(y.features, SparseGlobalAvgPool3d()(y))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: SparseBatchNorm3d(2),
    "batch norm without statistics": lambda: SparseBatchNorm3d(2, track_running_stats=False),
    "instance norm": lambda: SparseInstanceNorm3d(2, affine=True),
    "group norm": lambda: SparseGroupNorm(2, 2),
    "dropout": lambda: SparseDropout3d(0.5),
    "PReLU": SparsePReLU,
}


@settings(max_examples=80)
@given(
    name=st.sampled_from(sorted(LAYERS)), shape=EXTENTS, fill=FILL, training=st.booleans(), prune=st.booleans(),
    act=st.sampled_from([None, SparseReLU, SparseLeakyReLU, SparsePReLU]),
)  # fmt: skip
def test_norms_with_activations_and_dropout(
    name: str, shape: tuple[int, ...], fill: float, training: bool, prune: bool, act: type[nn.Module] | None
) -> None:
    x = sparse(shape, fill)
    x = x.prune(torch.zeros(len(x), dtype=torch.bool)) if prune else x
    layer = LAYERS[name]().train(training)
    fused = act is not None and isinstance(layer, SparseBatchNorm3d | SparseInstanceNorm3d)
    y = layer(x, act()) if fused else layer(x)
    assert len(y) == len(x)
    run_back(y.features)
    assert all(bool(buffer.isfinite().all()) for buffer in layer.buffers())


@settings(max_examples=30)
@given(shape=EXTENTS, fills=st.tuples(FILL, FILL))
def test_sums_and_concatenations(shape: tuple[int, ...], fills: tuple[float, float]) -> None:
    first, second = (sparse(shape, fill) for fill in fills)
    torch.testing.assert_close(union_add(first, second).dense(), first.dense() + second.dense())
    joined = concatenate_channels([first, second])
    torch.testing.assert_close(joined.dense(), torch.cat((first.dense(), second.dense()), 1))
    run_back(joined.features)


# Norms of one value in dense parts


def test_dense_norms_of_single_values_and_of_others() -> None:
    pairs = [
        (nn.BatchNorm3d(4), (1, 4, 1, 1, 1)), (nn.BatchNorm1d(4), (1, 4)), (nn.GroupNorm(4, 4), (1, 4, 1, 1, 1)),
        (nn.InstanceNorm3d(4, affine=True), (2, 4, 1, 1, 1)),
        (nn.BatchNorm3d(4, track_running_stats=False), (1, 4, 1, 1, 1)),
    ]  # fmt: skip
    for plain, shape in pairs:
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        twin = norms.accept_single_values(copy.deepcopy(plain))
        with pytest.raises(ValueError, match="Expected more than 1"):
            plain(torch.randn(shape))
        x = torch.randn(shape, requires_grad=True)
        y = twin(x)
        mean = getattr(plain, "running_mean", None)
        normalized = torch.zeros(shape) if mean is None else x / (1 + plain.eps) ** 0.5
        kept = (1, -1, *[1] * (len(shape) - 2))
        weight, bias = (1, 0) if plain.weight is None else (plain.weight.view(kept), plain.bias.view(kept))
        torch.testing.assert_close(y, (normalized * weight + bias).expand(shape))
        run_back(y)
        larger = torch.randn(3, 4, *[2] * (len(shape) - 2))
        assert torch.equal(twin(larger), plain(larger))


# Networks


@settings(max_examples=60)
@given(
    shape=EXTENTS, fill=FILL, norm=NORMS, units=st.sampled_from([0, 2]), training=st.booleans(), batch=st.integers(1, 2)
)
@pytest.mark.slow
def test_sparse_unet(
    shape: tuple[int, ...], fill: float, norm: str | tuple, units: int, training: bool, batch: int
) -> None:
    net = SparseUNet(3, 2, 2, (2, 4, 4), (2, 2), num_res_units=units, norm=norm, dropout=0.1).train(training)
    volume = some(shape, fill, batch=batch)
    y = net(volume)
    assert y.shape == (batch, 2, *shape)
    if fill:
        run_back(y)
    if not training:
        assert torch.equal(SparseInferer()(volume, net), y)


@settings(max_examples=40)
@given(
    shape=EXTENTS, factor=st.tuples(*[st.integers(1, 8)] * 3), norm=NORMS, units=st.sampled_from([0, 1]),
    training=st.booleans(), batch=st.integers(1, 2), recompute=st.booleans(),
    max_active=st.sampled_from([0.001, 0.3, 1]),
)  # fmt: skip
@pytest.mark.slow
def test_coarse_to_sparse(
    shape: tuple[int, ...], factor: tuple[int, ...], norm: str | tuple, units: int, training: bool, batch: int,
    recompute: bool, max_active: float,
) -> None:  # fmt: skip
    net = CoarseToSparseUNet(
        3, 2, 2, (2, 4), (2,), num_res_units=units, norm=norm, coarse_factor=factor, refine_channels=(2, 4),
        refine_strides=(2,), context_channels=2, max_active=max_active, use_checkpoint=recompute,
    ).train(training)  # fmt: skip
    y = net(torch.randn(batch, 2, *shape))
    assert y.shape == (batch, 2, *shape)
    run_back(y)


def test_the_examples_of_thin_volumes() -> None:
    assert CoarseToSparseUNet(3, 1, 2, (4, 8), (2,))(torch.randn(1, 1, 32, 32, 1)).shape == (1, 2, 32, 32, 1)
    net = OccupancyNet(1, 2, None, (8, 16), "interpolated").eval()
    for extent in range(1, 6):
        assert net(torch.randn(1, 1, *[extent] * 3)).isfinite().all()


@settings(max_examples=15)
@given(shape=EXTENTS, fills=st.tuples(FILL, FILL), recompute=st.booleans(), training=st.booleans())
def test_completion(shape: tuple[int, ...], fills: tuple[float, float], recompute: bool, training: bool) -> None:
    volume, target = (some(shape, fill, 1).ne(0).float() for fill in fills)
    net = SparseCompletionNet((2,) * 7, recompute).train(training)
    if training:
        loss = SparseCompletionLoss()(net(volume, target), target)
        run_back(loss)
    else:
        assert net(volume).shape == volume.shape


@settings(max_examples=40)
@given(
    shape=EXTENTS, channels=st.sampled_from([(4,), (8, 16), (3, 5, 7)]),
    norm=st.sampled_from([None, "instance", "batch"]),
    downscale=st.integers(1, 3), training=st.booleans(), batch=st.integers(1, 2), points=st.integers(0, 2),
)  # fmt: skip
def test_occupancy(
    shape: tuple[int, ...], channels: tuple[int, ...], norm: str | None, downscale: int, training: bool, batch: int,
    points: int,
) -> None:  # fmt: skip
    net = OccupancyNet(
        1, 2, None, channels, "interpolated", width=4, blocks=1, downscale=downscale, norm=norm
    ).train(training)  # fmt: skip
    volume = torch.randn(batch, 1, *shape)
    logits, coarse = net(volume, torch.zeros(batch, points, 3))
    assert logits.shape == (batch, points, 2)
    if points:
        label = torch.zeros(batch, 1, *shape)
        run_back(OccupancyLoss()((logits, coarse), (torch.zeros(batch, points).long(), label)))
    if not training:
        dense = net(volume).argmax(1, keepdim=True)
        assert torch.equal(OctreeInferer(stride=1, labels=True)(volume, net), dense.to(torch.uint8))


@pytest.mark.parametrize("statistics", ["scalar", "feature"])
@pytest.mark.parametrize("variant", ["o-net", "a", "b", "c", "d"])
def test_the_published_variants_at_their_smallest(variant: str, statistics: str) -> None:
    net = OccupancyNet(2, 1, (2, 2, 2), (4,), variant, width=4, blocks=1, downscale=1, statistics=statistics)  # type: ignore[arg-type]
    for batch in (1, 2):
        run_back(net(torch.randn(batch, 2, 2, 2, 2)), net(torch.randn(batch, 2, 2, 2, 2), torch.zeros(batch, 1, 3))[0])


@settings(max_examples=40)
@given(
    shape=EXTENTS, norm=NORMS, both=st.booleans(), training=st.booleans(), axis=st.integers(0, 2),
    checkpoint=st.sampled_from(["slice", "sqrt", 2, None]),
)  # fmt: skip
@pytest.mark.slow
def test_clstm(
    shape: tuple[int, ...], norm: str | tuple, both: bool, training: bool, axis: int, checkpoint: str | int | None
) -> None:
    net = CLSTMUNet(3, 1, 2, (2, 4), bidirectional=both, norm=norm, axis=axis, checkpoint=checkpoint)  # type: ignore[arg-type]
    net.train(training)
    volume = torch.randn(1, 1, *shape)
    y = net(volume)
    assert y.shape == (1, 2, *shape)
    run_back(y)
    if not training:
        torch.testing.assert_close(SlabInferer(2)(volume, net), y.detach(), rtol=1e-4, atol=1e-5)

"""Norms, activations, dropout and pooling on rows against torch on volumes and against plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from monai_memeff.sparse import SparseTensor
from monai_memeff.sparse.nn import activations, blocks
from tests.oracles import assert_same_as_dense, asymmetric
from tests.sparse.reference import mask_of, random_mask

SHAPE = (5, 4, 3)
BATCH = 3
CHANNELS = 4

FULL = torch.ones(BATCH, 1, *SHAPE, dtype=torch.bool)
TWINS: list[tuple[nn.Module, nn.Module]] = [
    (blocks.SparseBatchNorm3d(CHANNELS), nn.BatchNorm3d(CHANNELS)),
    (
        blocks.SparseBatchNorm3d(CHANNELS, affine=False, momentum=None),
        nn.BatchNorm3d(CHANNELS, affine=False, momentum=None),
    ),
    (
        blocks.SparseBatchNorm3d(CHANNELS, track_running_stats=False),
        nn.BatchNorm3d(CHANNELS, track_running_stats=False),
    ),
    (blocks.SparseInstanceNorm3d(CHANNELS), nn.InstanceNorm3d(CHANNELS)),
    (blocks.SparseInstanceNorm3d(CHANNELS, affine=True, eps=0.1), nn.InstanceNorm3d(CHANNELS, affine=True, eps=0.1)),
    (blocks.SparseGroupNorm(2, CHANNELS), nn.GroupNorm(2, CHANNELS)),
    (blocks.SparseGroupNorm(1, CHANNELS, affine=False), nn.GroupNorm(1, CHANNELS, affine=False)),
    (activations.SparseReLU(), nn.ReLU()),
    (activations.SparseLeakyReLU(0.2), nn.LeakyReLU(0.2)),
    (activations.SparsePReLU(CHANNELS), nn.PReLU(CHANNELS)),
    (activations.SparseELU(), nn.ELU()),
    (activations.SparseGELU(), nn.GELU()),
    (activations.SparseSiLU(), nn.SiLU()),
    (activations.SparseSigmoid(), nn.Sigmoid()),
    (activations.SparseTanh(), nn.Tanh()),
]


def on_volumes(layer: nn.Module, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A sparse layer as a function of a dense volume."""
    return lambda x: layer(SparseTensor.from_dense(x, mask)).dense()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("ours", "dense"), TWINS, ids=lambda layer: type(layer).__name__)
def test_full_masks_give_what_torch_gives(ours: nn.Module, dense: nn.Module, training: bool) -> None:
    ours, dense = ours.double().train(training), dense.double().train(training)
    for parameter in dense.parameters():
        parameter.data.uniform_(0.5, 1.5)
    for name, buffer in dense.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name == "running_var" else buffer.normal_()
    image = asymmetric((BATCH, CHANNELS, *SHAPE))
    assert_same_as_dense(on_volumes(ours, FULL), dense, image, modules=(ours, dense))


def by_hand(rows: Tensor, eps: float, axes: tuple[int, ...] = (0,)) -> Tensor:
    """(x - mean) / sqrt(var + eps), the variance without Bessel's correction."""
    mean = rows.mean(axes, keepdim=True)
    return (rows - mean) / ((rows - mean).square().mean(axes, keepdim=True) + eps).sqrt()


def partial(channels: int = CHANNELS, items: int = BATCH) -> SparseTensor:
    """Some voxels, none in item 1."""
    mask = random_mask(items, SHAPE, 0.4, empty_item=1)
    return SparseTensor.from_dense(asymmetric((items, channels, *SHAPE)), mask)


def per_item(x: SparseTensor, formula: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a formula to the rows of every batch item."""
    result = torch.zeros_like(x.features)
    for item in range(x.batch_size):
        rows = x.coordinates[:, 0] == item
        if rows.any():
            result[rows] = formula(x.features[rows])
    return result


def test_norms_see_active_voxels_only() -> None:
    x = partial()
    weight, bias = torch.rand(CHANNELS).double() + 0.5, torch.randn(CHANNELS).double()
    for layer, expected in (
        (blocks.SparseBatchNorm3d(CHANNELS), by_hand(x.features, 1e-5)),
        (blocks.SparseInstanceNorm3d(CHANNELS, affine=True), per_item(x, lambda rows: by_hand(rows, 1e-5))),
        (
            blocks.SparseGroupNorm(2, CHANNELS),
            per_item(x, lambda rows: by_hand(rows.view(-1, 2, 2), 1e-5, (0, 2)).view(-1, CHANNELS)),
        ),
    ):
        layer.double().load_state_dict({"weight": weight, "bias": bias}, strict=False)
        torch.testing.assert_close(layer(x).features, expected * weight + bias, rtol=1e-12, atol=1e-12)


def test_batch_norm_keeps_running_statistics_of_active_voxels() -> None:
    x, layer = partial(), blocks.SparseBatchNorm3d(CHANNELS, momentum=0.3).double()
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.3 * x.features.mean(0))
    torch.testing.assert_close(layer.running_var, 0.7 + 0.3 * x.features.var(0))
    assert layer.num_batches_tracked.item() == 1
    expected = (x.features - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
    torch.testing.assert_close(layer.eval()(x).features, expected)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=lambda o: str(o)
)
def test_batch_norm_of_one_voxel_or_none(count: int, training: bool, options: dict[str, object]) -> None:
    x = partial()
    x = x.prune(torch.arange(len(x)) < count)
    layer = blocks.SparseBatchNorm3d(CHANNELS, **options).double().train(training)
    if layer.running_mean is not None:
        layer.running_mean.fill_(0.5)
        layer.running_var.fill_(4.0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    features = x.features.clone().requires_grad_()
    y = layer(x.replace(features)).features
    known = layer.running_mean is not None
    expected = (features - 0.5) / (4 + layer.eps) ** 0.5 if known else torch.zeros_like(features)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert bool(features.grad.isfinite().all())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "layer",
    [
        blocks.SparseInstanceNorm3d(CHANNELS, affine=True),
        blocks.SparseInstanceNorm3d(CHANNELS),
        blocks.SparseGroupNorm(CHANNELS, CHANNELS),
        blocks.SparseGroupNorm(2, CHANNELS),
    ],
    ids=["instance affine", "instance", "group of one", "group of two"],
)
@pytest.mark.parametrize("training", [True, False])
def test_per_item_norms_of_one_voxel_or_none(layer: nn.Module, training: bool) -> None:
    coordinates = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 0], [2, 0, 0, 1]])
    features = asymmetric((3, CHANNELS)).requires_grad_()
    layer = layer.double().train(training)
    y = layer(SparseTensor(features, coordinates, SHAPE, batch_size=4)).features
    groups = getattr(layer, "num_groups", CHANNELS)
    for rows in (slice(0, 1), slice(1, 3)):
        grouped = features[rows].view(-1, groups, CHANNELS // groups)
        torch.testing.assert_close(y[rows], by_hand(grouped, layer.eps, (0, 2)).view(-1, CHANNELS), rtol=0, atol=1e-9)
    y.square().sum().backward()
    assert bool(features.grad.isfinite().all())
    empty = SparseTensor(features[:0], coordinates[:0], SHAPE, batch_size=2)
    assert layer(empty).features.shape == (0, CHANNELS)


def test_running_statistics_of_instance_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="set track_running_stats=False"):
        blocks.SparseInstanceNorm3d(CHANNELS, track_running_stats=True)(partial().to(dtype=torch.float32))


@pytest.mark.parametrize("layer", [twin for twin, _ in TWINS], ids=lambda layer: type(layer).__name__)
def test_autocast_keeps_one_dtype(layer: nn.Module) -> None:
    x = partial().to(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer.float().train()(x)
    assert y.features.shape == x.features.shape
    assert bool(y.features.isfinite().all())


def dense_pool(reduction: str, kernel: int, stride: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Pooling of a volume and its mask, -inf (or nothing) where it is not active, at ceil(extent / stride) places."""
    margin = (kernel - 1) // 2 if kernel > stride else 0

    def padded(volume: Tensor, value: float) -> Tensor:
        room = [stride * (-(-n // stride) - 1) + kernel - margin - n for n in volume.shape[2:]]
        pads = [p for n in reversed(room) for p in (margin, max(0, n))]
        return functional.pad(volume, pads, value=value)

    def cut(volume: Tensor, like: Tensor) -> Tensor:
        i, j, k = (-(-n // stride) for n in like.shape[2:])
        return volume[..., :i, :j, :k]

    def pool(x: Tensor, mask: Tensor) -> Tensor:
        if reduction == "max":
            filled = padded(x.masked_fill(~mask, -torch.inf), -torch.inf)
            return cut(functional.max_pool3d(filled, kernel, stride), x)
        total = functional.avg_pool3d(padded(x * mask, 0), kernel, stride) * kernel**3
        count = functional.avg_pool3d(padded(mask.double(), 0), kernel, stride) * kernel**3
        return cut(total / count.clamp(min=1), x)

    return pool


@pytest.mark.parametrize("reduction", ["max", "avg"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1), (3, 3), (2, 1), (5, 2), (1, 1)])
@pytest.mark.parametrize("occupancy", [0.4, 1.0, 0.0])
def test_pooling(reduction: str, kernel: int, stride: int, occupancy: float) -> None:
    layer = {"max": blocks.SparseMaxPool3d, "avg": blocks.SparseAvgPool3d}[reduction](kernel, stride)
    mask = random_mask(BATCH, (7, 4, 5), occupancy, empty_item=1)
    image = asymmetric((BATCH, CHANNELS, 7, 4, 5))
    where = mask_of(layer(SparseTensor.from_dense(image, mask)))
    dense = dense_pool(reduction, kernel, stride)
    assert_same_as_dense(on_volumes(layer, mask), lambda x: dense(x, mask).masked_fill(~where, 0.0), image, where=where)


def test_pooling_keeps_ties_and_the_default_stride() -> None:
    layer = blocks.SparseMaxPool3d((2, 1, 3))
    assert layer.stride == (2, 1, 3)
    x = SparseTensor(torch.full((2, 1), -7.0), torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]]), (2, 1, 3))
    features = x.features.requires_grad_()
    y = layer(x)
    assert y.features.tolist() == [[-7.0]], "absent voxels do not count as zero"
    y.features.sum().backward()
    assert features.grad.sum().item() == 1.0


def test_a_window_without_active_voxels_gives_zero() -> None:
    x = SparseTensor(torch.ones(2, 1), torch.tensor([[0, 0, 0, 0], [0, 3, 0, 0]]), (4, 1, 1))
    for layer in (blocks.SparseMaxPool3d(1, 2), blocks.SparseAvgPool3d(1, 2)):
        assert layer(x).features.tolist() == [[1.0], [0.0]]


def test_global_average_pooling() -> None:
    x = partial()
    pooled = blocks.SparseGlobalAvgPool3d()(x)
    counts = torch.bincount(x.coordinates[:, 0], minlength=BATCH)
    assert pooled.shape == (BATCH, CHANNELS)
    assert torch.equal(pooled[1], torch.zeros(CHANNELS).double())
    for item in (0, 2):
        mean = x.features[x.coordinates[:, 0] == item].sum(0) / counts[item]
        torch.testing.assert_close(pooled[item], mean)


def test_global_average_pooling_of_many_voxels_stays_within_half_precision() -> None:
    image = torch.full((1, 1, 50, 50, 50), 2.0).half()
    everything = SparseTensor.from_dense(image, image > 0)
    assert blocks.SparseGlobalAvgPool3d()(everything).tolist() == [[2.0]]  # the sum is beyond 65504


def test_dropout3d_drops_whole_channels_of_an_item() -> None:
    x = partial(channels=200)
    x = x.replace(torch.ones_like(x.features).requires_grad_())
    layer = activations.SparseDropout3d(0.25)
    y = layer(x).features
    for item in (0, 2):
        rows = y[x.coordinates[:, 0] == item]
        assert torch.equal(rows, rows[:1].expand_as(rows)), "a channel is dropped everywhere or nowhere"
        assert set(rows[0].tolist()) == {0.0, 1 / 0.75}
        assert 0.1 < float((rows[0] == 0).double().mean()) < 0.4
    assert not torch.equal(y[0], y[-1]), "items are drawn apart"
    y.sum().backward()
    assert torch.equal(x.features.grad, y.detach())
    assert layer.eval()(x) is x


def test_dropout_drops_single_values() -> None:
    x = partial(channels=50)
    y = activations.SparseDropout(0.5)(x.replace(torch.ones_like(x.features))).features
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert int((y.sum(0) > 0).sum()) > 0
    assert activations.SparseDropout(0.5).eval()(x).features is not None

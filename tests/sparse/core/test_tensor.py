"""SparseTensor: to and from dense volumes, unions, pruning, rows in any order, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_memeff.sparse import SparseTensor, active_voxels, concatenate_channels, union_add
from monai_memeff.sparse.core.tensor import nonzero_voxels
from tests.oracles import assert_adjoint, assert_same_as_dense, asymmetric
from tests.sparse.reference import mask_of, random_mask, shuffled_rows

SHAPE = (5, 3, 6)
BATCH = 3


MASKS = ("partial", "empty", "full")
PAIRS = ("overlapping", "equal", "disjoint", "second empty", "first empty", "both empty")


def mask_called(name: str) -> Tensor:
    """(B, 1, H, W, D); the partial one has an empty item."""
    occupancy = {"partial": 0.4, "empty": 0.0, "full": 1.0}[name]
    return random_mask(BATCH, SHAPE, occupancy, empty_item=1 if name == "partial" else None)


def masks_called(name: str) -> tuple[Tensor, Tensor]:
    """Two masks that lie as the name says."""
    first, nothing = mask_called("partial"), mask_called("empty")
    second = random_mask(BATCH, SHAPE, 0.4, empty_item=2)
    seconds = (second, first.clone(), ~first, nothing, first, nothing)
    return (nothing if name in ("first empty", "both empty") else first), dict(zip(PAIRS, seconds, strict=True))[name]


def sparse(mask: Tensor, channels: int = 2) -> SparseTensor:
    """Asymmetric float64 features on a mask."""
    return SparseTensor.from_dense(asymmetric((len(mask), channels, *mask.shape[2:])), mask)


@pytest.mark.parametrize("kind", MASKS)
def test_round_trip(kind: str) -> None:
    mask = mask_called(kind)
    image = asymmetric((BATCH, 2, *SHAPE))
    x = SparseTensor.from_dense(image, mask)
    assert torch.equal(x.dense(), image * mask)
    assert torch.equal(mask_of(x), mask)
    assert torch.equal(x.dense(fill=-3.0), torch.where(mask, image, -3.0))
    by_channel = x.dense(fill=[10.0, 0.5])
    assert torch.equal(by_channel, torch.where(mask, image, torch.tensor([10.0, 0.5]).double().view(1, 2, 1, 1, 1)))
    assert (len(x), x.batch_size, x.spatial_shape, x.stride) == (int(mask.sum()), BATCH, SHAPE, (1, 1, 1))
    assert x.occupancy == pytest.approx(float(mask.double().mean()), abs=1e-12)
    assert_same_as_dense(lambda v: SparseTensor.from_dense(v, mask).dense(), lambda v: v * mask, image)


def test_round_trip_is_self_adjoint() -> None:
    x = sparse(mask_called("partial"))
    assert_adjoint(lambda f: x.replace(f).dense(), None, x.features, asymmetric((BATCH, 2, *SHAPE)).flip(0))


def test_rows_are_sorted_and_gradients_follow() -> None:
    x = sparse(mask_called("partial"))
    other = shuffled_rows(x)
    assert torch.equal(other.coordinates, x.coordinates)
    assert torch.equal(other.features, x.features)
    features = asymmetric((3, 1)).requires_grad_()
    y = SparseTensor(features, torch.tensor([[0, 2, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]), SHAPE)
    (y.features[:, 0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert features.grad.flatten().tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_coordinates_of_any_integer_type(dtype: torch.dtype) -> None:
    x = sparse(mask_called("partial"))
    y = SparseTensor(x.features, x.coordinates.to(dtype), SHAPE, batch_size=BATCH)
    assert torch.equal(y.dense(), x.dense())


def test_batch_size_and_stride_defaults() -> None:
    x = SparseTensor(torch.ones(1, 1), torch.tensor([[4, 0, 0, 0]]), SHAPE, stride=2)
    assert (x.batch_size, x.stride) == (5, (2, 2, 2))
    empty = SparseTensor(torch.ones(0, 3), torch.zeros(0, 4, dtype=torch.int64), SHAPE, stride=(1, 2, 4))
    assert (empty.batch_size, empty.stride, empty.dense().shape) == (1, (1, 2, 4), (1, 3, *SHAPE))


@pytest.mark.parametrize("kind", PAIRS)
def test_union_add(kind: str) -> None:
    first, second = masks_called(kind)

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return (SparseTensor.from_dense(a, first) + SparseTensor.from_dense(b, second)).dense()

    images = asymmetric((BATCH, 2, *SHAPE)), asymmetric((BATCH, 2, *SHAPE)).flip(0)
    assert_same_as_dense(ours, lambda a, b: a * first + b * second, *images)
    assert torch.equal(mask_of(sparse(first) + sparse(second)), first | second)


@pytest.mark.parametrize("kind", PAIRS)
def test_concatenate(kind: str) -> None:
    first, second = masks_called(kind)
    third = random_mask(BATCH, SHAPE, 0.1)
    everything = (first, second, third)

    def ours(*images: Tensor) -> Tensor:
        parts = [SparseTensor.from_dense(image, mask) for image, mask in zip(images, everything, strict=True)]
        return concatenate_channels(parts).dense()

    def dense(*images: Tensor) -> Tensor:
        return torch.cat([image * mask for image, mask in zip(images, everything, strict=True)], dim=1)

    images = [asymmetric((BATCH, channels, *SHAPE)) for channels in (2, 1, 3)]
    assert_same_as_dense(ours, dense, *images)
    joined = concatenate_channels([sparse(mask) for mask in everything])
    assert torch.equal(mask_of(joined), first | second | third)
    assert concatenate_channels([joined]) is joined


def test_union_of_equal_sets_keeps_the_set_and_its_plans() -> None:
    x = sparse(mask_called("partial"))
    assert (x + x).voxels is x.voxels
    assert concatenate_channels([x, x]).voxels is x.voxels


def test_union_add_under_autocast_takes_the_dtype_of_the_first() -> None:
    first, second = masks_called("overlapping")
    total = sparse(first).to(dtype=torch.float32) + sparse(second).to(dtype=torch.bfloat16)
    assert total.dtype == torch.float32


@pytest.mark.parametrize("kind", MASKS)
def test_prune(kind: str) -> None:
    mask = mask_called(kind)
    image = asymmetric((BATCH, 2, *SHAPE))
    kept = mask & (image[:, :1] > 0)
    x = SparseTensor.from_dense(image, mask)
    assert torch.equal(mask_of(x.prune(x.features[:, 0] > 0)), kept)

    def ours(volume: Tensor) -> Tensor:
        y = SparseTensor.from_dense(volume, mask)
        return y.prune(x.features[:, 0] > 0).dense()

    assert_same_as_dense(ours, lambda volume: volume * kept, image)
    assert len(x.prune(torch.zeros(len(x), dtype=torch.bool))) == 0


def test_to_moves_and_casts() -> None:
    x = sparse(mask_called("partial"))
    half = x.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.voxels is x.voxels
    elsewhere = x.to("meta")
    assert elsewhere.device.type == elsewhere.voxels.device.type == "meta"
    assert (elsewhere.spatial_shape, elsewhere.stride, elsewhere.batch_size) == (SHAPE, (1, 1, 1), BATCH)


def test_repr_tells_what_it_is() -> None:
    text = repr(sparse(mask_called("full")))
    for word in ("270 voxels x 2 channels", "(5, 3, 6)", "batch_size=3", "float64", "cpu"):
        assert word in text


def test_occupied_takes_the_voxels_that_are_not_zero() -> None:
    volume = torch.zeros(1, 1, *SHAPE)
    volume[0, 0, 1, 2, 3], volume[0, 0, 4, 0, 0] = 2.0, -1.0
    x = nonzero_voxels(volume)
    assert x.coordinates.tolist() == [[0, 1, 2, 3], [0, 4, 0, 0]]
    assert nonzero_voxels(x) is x
    assert nonzero_voxels(volume.bool()).features.tolist() == [[1.0], [1.0]]


def test_active_voxels() -> None:
    image = torch.zeros(1, 2, *SHAPE)
    image[0, 0, 0, 0, 0], image[0, 1, 1, 1, 1], image[0, 1, 2, 2, 2] = -5.0, 1.0, 3.0
    assert active_voxels(image).nonzero()[:, 2:].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert active_voxels(image, threshold=1.0).nonzero()[:, 2:].tolist() == [[2, 2, 2]]
    assert int(active_voxels(image, background=3.0).sum()) == 5 * 3 * 6
    assert active_voxels(image).shape == (1, 1, *SHAPE)


def good() -> dict[str, object]:
    """Arguments that make a tensor."""
    return {
        "features": torch.ones(2, 1),
        "coordinates": torch.tensor([[0, 0, 0, 0], [1, 4, 2, 5]]),
        "spatial_shape": SHAPE,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(2, 1).long()}, r"floating point \(N, C\), got torch.int64 of \(2, 1\)"),
        ({"features": torch.ones(2)}, r"floating point \(N, C\), got torch.float32 of \(2,\)"),
        ({"coordinates": torch.zeros(2, 3).long()}, r"integers of shape \(2, 4\) as \[batch, i, j, k\].*got.*\(2, 3\)"),
        ({"coordinates": torch.zeros(2, 4)}, r"integers of shape .*got torch.float32"),
        ({"coordinates": torch.zeros(2, 4).bool()}, r"got torch.bool"),
        ({"coordinates": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0]])}, "unique, got at least two rows.*merge"),
        (
            {"coordinates": torch.tensor([[0, 0, 0, 0], [0, 0, -1, 0]])},
            r"coordinate j .* in 0 ... 2, got -1 ... 0",
        ),
        ({"coordinates": torch.tensor([[0, 0, 0, 0], [0, 0, 0, 6]])}, r"coordinate k must lie in 0 ... 5.*crop"),
        ({"coordinates": torch.tensor([[0, 0, 0, 0], [0, 5, 0, 0]])}, r"coordinate i must lie in 0 ... 4, got 0 ... 5"),
        ({"batch_size": 1}, r"coordinate batch must lie in 0 ... 0, got 0 ... 1"),
        ({"spatial_shape": (5, 3)}, "three extents between 1 and 262144"),
        ({"spatial_shape": (5, 3, 2**18 + 1)}, "three extents between 1 and 262144"),
        ({"batch_size": 2**62}, r"at most 2\^63 - 1"),
    ],
)
def test_bad_rows_are_refused(change: dict[str, object], message: str) -> None:
    SparseTensor(**good())
    with pytest.raises(ValueError, match=message):
        SparseTensor(**{**good(), **change})


def test_bad_volumes_masks_and_partners_are_refused() -> None:
    image, mask = torch.zeros(2, 1, *SHAPE), torch.ones(2, 1, *SHAPE, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(B, C, H, W, D\), got \(1, 5, 3, 6\)"):
        SparseTensor.from_dense(image[0], mask)
    with pytest.raises(ValueError, match=r"boolean of shape \(2, 1, 5, 3, 6\), got torch.float32"):
        SparseTensor.from_dense(image, mask.float())
    with pytest.raises(ValueError, match=r"got torch.bool of \(1, 1, 5, 3, 6\)"):
        SparseTensor.from_dense(image, mask[:1])
    x = SparseTensor.from_dense(image, mask)
    with pytest.raises(ValueError, match=r"keep must be boolean of shape \(180,\), got torch.float32"):
        x.prune(torch.ones(180))
    with pytest.raises(ValueError, match=r"share one grid, got .*stride"):
        union_add(x, SparseTensor(x.features, x.coordinates, SHAPE, stride=2))
    with pytest.raises(ValueError, match="equal channels, got 1 and 2"):
        union_add(x, x.replace(torch.zeros(180, 2)))
    with pytest.raises(ValueError, match="at least one SparseTensor, got none"):
        concatenate_channels([])
    with pytest.raises(ValueError, match=r"\(B, 1, H, W, D\), got \(2, 2, 5, 3, 6\)"):
        nonzero_voxels(torch.zeros(2, 2, *SHAPE))

"""Integers, booleans and other floating-point dtypes to every network: exact, or refused by the dtypes' names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_memeff.apps.skull import RandSkullDefect, RandSkullVariation, SkullShell, UpperSkullCrop
from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.occupancy import OccupancyNet, OctreeInferer, RandOccupancyPoints
from monai_memeff.occupancy.evaluator import label_dtype
from monai_memeff.sparse import (
    CoarseToSparseUNet,
    DownsampleMask,
    RandSegmentationErrors,
    RandVoxelDropout,
    SparseCompletionLoss,
    SparseCompletionNet,
    SparseCoordinates,
    SparseInferer,
    SparseTensor,
    SparseUNet,
)
from monai_memeff.transforms import DilateMask, OpenMask

SHAPE = (5, 6, 7)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "SparseUNet": lambda: SparseUNet(3, 1, 2, (2, 4), (2,)),
    "CoarseToSparseUNet": lambda: CoarseToSparseUNet(
        3, 1, 2, (2, 4), (2,), refine_channels=(2, 4), refine_strides=(2,)
    ),
    "SparseCompletionNet": lambda: SparseCompletionNet((2,) * 7),
    "OccupancyNet": lambda: OccupancyNet(1, 2, None, (4,), "interpolated", width=4, blocks=1),
    "OccupancyNet d": lambda: OccupancyNet(1, 2, (4, 6, 8), (4,), "d", width=4, blocks=1, downscale=1),
    "CLSTMUNet": lambda: CLSTMUNet(3, 1, 2, (2, 4)),
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def shape_of(name: str) -> tuple[int, int, int]:
    """The extents that the network takes."""
    return (4, 6, 8) if name == "OccupancyNet d" else SHAPE


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_integers_and_booleans_give_what_their_floats_give(name: str, dtype: torch.dtype) -> None:
    net = NETWORKS[name]().eval()
    volume = torch.randint(0, 5, (1, 1, *shape_of(name))).to(dtype)
    with torch.no_grad():
        y, expected = net(volume), net(volume.float())
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    if name.startswith("OccupancyNet"):
        assert torch.equal(OctreeInferer(stride=1)(volume, net), OctreeInferer(stride=1)(volume.float(), net))
    if name.startswith("Sparse"):
        assert torch.equal(SparseInferer()(volume, net), expected)
    if name == "CLSTMUNet":
        torch.testing.assert_close(SlabInferer(3)(volume, net), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "SparseCompletionNet"])
def test_another_floating_point_dtype_is_refused_by_name(name: str) -> None:
    net, shape = NETWORKS[name]().eval(), shape_of(name)
    for mine, theirs in ((torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.half)):
        with pytest.raises(ValueError, match=rf"computes in {mine}, got an input of {theirs}; convert"):
            net.to(mine)(torch.randn(1, 1, *shape).to(theirs))
    with pytest.raises(ValueError, match=r"takes real numbers, got torch\.complex64"):
        net(torch.zeros(1, 1, *shape, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"holds integers up to 16777216 exactly, got 20000000; scale"):
        net.float()(torch.full((1, 1, *shape), 20_000_000))
    with pytest.raises(TypeError, match="takes a tensor, got ndarray"):
        net(np.zeros((1, 1, *shape), np.float32))
    assert net.double()(torch.randn(1, 1, *shape).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("inferer", "name"),
    [(SlabInferer(), "CLSTMUNet"), (OctreeInferer(), "OccupancyNet"), (SparseInferer(), "SparseUNet")],
)
def test_an_inferer_takes_tensors_only(inferer: Callable[..., Any], name: str) -> None:
    """An array would be walked along its first axis, as if it were of slabs."""
    net, volume = NETWORKS[name]().eval(), np.zeros((1, 1, *shape_of(name)), np.float32)
    with pytest.raises(TypeError, match="takes a tensor, got ndarray"):
        inferer(volume, net)
    if isinstance(inferer, SlabInferer):
        with pytest.raises(TypeError, match="SlabInferer takes a tensor, got ndarray"):
            inferer.write(volume, net, np.zeros_like(volume))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "SparseCompletionNet"])
def test_autocast_takes_what_it_converts(name: str) -> None:
    net = NETWORKS[name]().eval()
    volume = torch.randn(1, 1, *shape_of(name))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(volume).isfinite().all()
        with pytest.raises(ValueError, match="computes in"):
            net(volume.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "SparseCompletionNet"])
def test_half_precision_on_a_cpu_is_the_network_rounded(name: str, dtype: torch.dtype) -> None:
    """Torch lacks some of its operations there; what one network computes, all of them do."""
    net, volume = NETWORKS[name]().eval().to(dtype), torch.randn(1, 1, *shape_of(name)).to(dtype)
    if isinstance(net, CoarseToSparseUNet):
        net.max_active = net.certainty = 1.0  # else rounding chooses other cells
    with torch.no_grad():
        found, octree = net(volume), name.startswith("OccupancyNet") and OctreeInferer(stride=1)(volume, net)
        net = net.double()
        expected = net(volume.double())
    assert found.dtype in (dtype, torch.float32)
    bound = (0.1 if dtype == torch.bfloat16 else 0.02) * float(expected.abs().max())
    for one in (found, octree):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one.double(), expected, rtol=0, atol=bound)


def test_the_completion_network_takes_masks_of_any_dtype() -> None:
    net = SparseCompletionNet((2,) * 7).eval()
    mask = torch.rand(1, 1, *SHAPE) < 0.4
    expected = net(mask.float())
    for dtype in (*INTEGERS, torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(net(mask.to(dtype)), expected)
    assert net.double()(mask).dtype == torch.float64


def test_sparse_tensors_follow_the_same_rule() -> None:
    net = NETWORKS["SparseUNet"]()
    x = SparseTensor(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.int64), SHAPE)
    with pytest.raises(ValueError, match=r"computes in torch\.float32, got an input of torch\.float64"):
        net(x)
    with pytest.raises(ValueError, match=r"features must be floating point .* convert them with \.float\(\)"):
        SparseTensor(torch.ones(1, 1).long(), torch.zeros(1, 4, dtype=torch.int64), SHAPE)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_negative_batch_index_is_named(batch_size: int | None) -> None:
    with pytest.raises(ValueError, match="batch index, first in every coordinate, must be 0 or more, got -1; number"):
        SparseTensor(torch.ones(1, 1), torch.tensor([[-1, 0, 0, 0]]), SHAPE, batch_size=batch_size)


def test_a_skull_is_a_tensor_or_an_array() -> None:
    skull = np.zeros((1, 24, 24, 24), np.uint8)
    skull[:, 2:22, 2:22, 2:22] = 1
    ours = RandSkullDefect().set_random_state(0)(skull)
    expected = RandSkullDefect().set_random_state(0)(torch.from_numpy(skull))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    for thing in ([[1]], None, "skull.nii"):
        with pytest.raises(TypeError, match=r"a skull must be a tensor or an array .* got \w+; load it first"):
            RandSkullDefect()(thing)


@pytest.mark.parametrize("classes", [2, 2**8, 2**8 + 1, 2**15, 2**15 + 1])
def test_labels_fit_into_their_dtype(classes: int) -> None:
    assert torch.iinfo(label_dtype(classes)).max >= classes - 1
    logits = torch.zeros(1, classes, 1, 1, 2)
    logits[0, classes - 1] = 1

    class Fixed(nn.Module):
        """Gives these logits."""

        axis, bidirectional = 2, False

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def sweep(self, slab: Tensor, state: None, end: None) -> tuple[Tensor, None]:
            """The logits of a slab."""
            return logits[..., : slab.shape[-1]], None

    assert SlabInferer(1, labels=True)(torch.zeros(1, 1, 1, 1, 2), Fixed().eval()).tolist() == [[[[[classes - 1] * 2]]]]
    octree = OctreeInferer(labels=True)(
        torch.zeros(1, 1, 1, 1, 2), lambda at: logits[0, :, 0, 0, :1].T.expand(*at.shape[:2], -1)
    )
    assert octree.tolist() == [[[[[classes - 1] * 2]]]]


def test_logits_are_not_written_into_integers() -> None:
    net = CLSTMUNet(3, 1, 2, (2, 4)).eval()
    volume = torch.randn(1, 1, *SHAPE)
    for out in (
        np.zeros((1, 2, *SHAPE), np.uint8),
        torch.zeros(1, 2, *SHAPE, dtype=torch.int16),
        np.zeros((1, 2, *SHAPE), bool),
    ):
        with pytest.raises(ValueError, match="cannot hold every value"):
            SlabInferer(2).write(volume, net, out)
        assert not out.any()
    labels = np.zeros((1, 1, *SHAPE), np.uint8)
    SlabInferer(2, labels=True).write(volume, net, labels)
    assert np.array_equal(labels, SlabInferer(2, labels=True)(volume, net).numpy())


ODD = (
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
)  # torch stores them, no more
MASK_TRANSFORMS: dict[str, Callable[[], Callable]] = {
    "RandSkullDefect": lambda: RandSkullDefect().set_random_state(0),
    "RandSkullVariation": lambda: RandSkullVariation(bend=0.0).set_random_state(0),
    "SkullShell": SkullShell,
    "UpperSkullCrop": lambda: UpperSkullCrop(keep=3, face=1),
    "RandVoxelDropout": lambda: RandVoxelDropout(0.5).set_random_state(0),
    "DownsampleMask": lambda: DownsampleMask(factor=2),
    "DilateMask": DilateMask,
    "OpenMask": OpenMask,
    "RandSegmentationErrors": lambda: RandSegmentationErrors(prob=1.0).set_random_state(0),
    "RandOccupancyPoints": lambda: RandOccupancyPoints(16).set_random_state(0),
}


def head_mask() -> Tensor:
    """A hollow box, large enough for every transform."""
    mask = torch.zeros(1, 12, 13, 14)
    mask[:, 1:11, 1:11, 1:12] = 1
    mask[:, 3:9, 3:9, 3:10] = 0
    return mask


def first(result: Any) -> Tensor:
    """The tensor that a transform returns, or the first of several."""
    found = result if isinstance(result, Tensor) else next(iter(result))
    return torch.as_tensor(found).as_subclass(Tensor).float()


@pytest.mark.parametrize("dtype", ODD)
@pytest.mark.parametrize("name", MASK_TRANSFORMS)
def test_mask_transforms_take_every_real_dtype(name: str, dtype: torch.dtype) -> None:
    make, mask = MASK_TRANSFORMS[name], head_mask()
    assert torch.equal(first(make()(mask.to(dtype))), first(make()(mask)))


@pytest.mark.parametrize("name", MASK_TRANSFORMS)
def test_mask_transforms_refuse_what_is_no_mask(name: str) -> None:
    transform = MASK_TRANSFORMS[name]()
    with pytest.raises(ValueError, match="takes real numbers, got"):
        transform(head_mask() * 1j)
    with pytest.raises(ValueError, match="needs finite values"):
        transform(head_mask() * float("nan"))
    for junk in (None, "head.nii"):
        with pytest.raises(TypeError, match=r"a tensor or an array.*load it first"):
            transform(junk)
    if name != "RandOccupancyPoints":  # labels may have any number
        with pytest.raises(ValueError, match="needs masks"):
            transform(head_mask() - 0.5)


def test_the_value_of_bone_does_not_matter_to_variations() -> None:
    vary = RandSkullVariation(bend=0.0).set_random_state(0)
    expected = vary(head_mask())
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(vary((head_mask() * 255).to(torch.uint8), randomize=False).float(), expected)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_unsigned_integers(name: str, dtype: torch.dtype) -> None:
    net, volume = NETWORKS[name]().eval(), torch.randint(0, 5, (1, 1, *shape_of(name)))
    with torch.no_grad():
        assert torch.equal(net(volume.to(dtype)), net(volume.float()))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_volumes_with_metadata(name: str, train: bool) -> None:
    net, volume = NETWORKS[name]().train(train), (torch.rand(2, 1, *shape_of(name)) < 0.4).float()
    arguments = ((volume,) if name == "SparseCompletionNet" else ()) if train else ()
    results = [net(volume, *arguments), net(MetaTensor(volume), *arguments)]
    plain, found = (result[-1] if isinstance(result, list | tuple) else result for result in results)
    if isinstance(plain, SparseTensor):
        assert isinstance(found, SparseTensor)
        assert type(found.features) is Tensor
        plain, found = plain.dense(), found.dense()
    torch.testing.assert_close(found.as_subclass(Tensor), plain, rtol=1e-4, atol=1e-5)


def test_rows_of_sparse_tensors_have_no_metadata() -> None:
    place = torch.zeros(1, 4, dtype=torch.int64)
    x = SparseTensor(MetaTensor(torch.ones(1, 1)), MetaTensor(place), SHAPE)
    assert type(x.features) is type(x.coordinates) is type(x.replace(MetaTensor(torch.ones(1, 2))).features) is Tensor


def test_the_completion_network_refuses_logits_and_complex_numbers() -> None:
    net, mask = SparseCompletionNet((2,) * 7, ignore_index=-1), torch.ones(1, 1, *SHAPE)
    with pytest.raises(ValueError, match="SparseCompletionNet needs masks"):
        net.eval()(mask - 1.5)
    with pytest.raises(ValueError, match="a target of the completion network needs masks"):
        net.train()(mask, mask - 2.5)
    with pytest.raises(ValueError, match="takes real numbers"):
        net.eval()(mask * 1j)
    levels = net.train()(mask, -mask)  # nothing is annotated
    assert SparseCompletionLoss(ignore_index=-1)(levels, -mask) == 0
    with pytest.raises(ValueError, match="a target of the completion network needs masks"):
        SparseCompletionLoss()(levels, -mask)


def test_coordinates_keep_integers_exact() -> None:
    volume = torch.full((1, 1, 1, 2), 2**24 + 1)
    with pytest.raises(ValueError, match="holds integers up to 16777216 exactly"):
        SparseCoordinates()(volume)
    assert SparseCoordinates(constant=1.0)(volume)[1].tolist() == [[1.0], [1.0]]

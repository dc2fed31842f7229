"""Slabs in order, in their place in space, and the volume they came from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose

from monai_memeff.clstm import CLSTMUNet, SlabInferer, SliceSequence, SliceSequenced, SliceSequenceDict

AFFINE = torch.tensor([[0.0, 2.0, 0.0, 5.0], [-1.0, 0, 0, 6.0], [0, 0, 3.0, 7.0], [0, 0, 0, 1.0]], dtype=torch.float64)


def volume(*shape: int) -> MetaTensor:
    return MetaTensor(torch.rand(*(shape or (2, 5, 6, 11))), affine=AFFINE.clone())


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize(("slab", "overlap"), [(4, 0), (4, 2), (3, 5), (1, 0), (50, 3)])
def test_slabs_lie_where_they_came_from_and_go_back(axis: int, slab: int, overlap: int) -> None:
    x = volume()
    cut = SliceSequence(slab, axis, overlap)
    slabs = cut(x)
    starts = [max(0, z - overlap) for z in range(0, x.shape[1 + axis % 3], slab)]
    assert len(slabs) == len(starts)
    for start, part in zip(starts, slabs, strict=True):
        corner = torch.zeros(4, dtype=torch.float64)
        corner[3], corner[axis % 3] = 1, start
        torch.testing.assert_close(part.affine @ torch.tensor([0.0, 0, 0, 1], dtype=torch.float64), AFFINE @ corner)
        assert torch.equal(part.as_tensor(), x.as_tensor().narrow(1 + axis % 3, start, part.shape[1 + axis % 3]))
    back = cut.inverse(slabs)
    assert torch.equal(back.as_tensor(), x.as_tensor())
    assert torch.equal(back.affine, x.affine)


def test_overlaps_come_from_the_slab_before() -> None:
    cut = SliceSequence(4, overlap=2)
    slabs = [torch.full_like(part, number) for number, part in enumerate(cut(torch.zeros(1, 2, 2, 10)))]
    assert cut.inverse(slabs)[0, 0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2


def test_millimeters() -> None:
    cut = SliceSequence(slab=12.4, overlap=3, mm=True)
    assert [part.shape[-1] for part in cut(volume())] == [4, 5, 4]
    with pytest.raises(ValueError, match="needs the slice spacing"):
        cut(torch.rand(1, 4, 4, 4))


def test_another_spacing_is_refused() -> None:
    assert len(SliceSequence(4, spacing=3.02)(volume())) == 3
    with pytest.raises(ValueError, match=r"slices lie 3 mm apart, 1\.5 mm are expected; resample with Spacingd"):
        SliceSequence(4, spacing=1.5)(volume())
    with pytest.raises(ValueError, match="load the volume as a MetaTensor"):
        SliceSequence(4, spacing=1.5)(np.zeros((1, 4, 4, 4)))


def test_slabs_out_of_order_are_refused() -> None:
    cut = SliceSequence(4)
    slabs = cut(volume())
    with pytest.raises(ValueError, match="slab 1 does not continue the one before it"):
        cut.inverse([slabs[0], slabs[2]])
    with pytest.raises(ValueError, match="at least one slab"):
        cut.inverse([])


@pytest.mark.parametrize("options", [{"slab": 0}, {"overlap": -1}, {"axis": 3}], ids=["slab", "overlap", "axis"])
def test_bad_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match=r"slab and spacing must be positive and finite, overlap not negative|axis must be a whole number",
    ):
        SliceSequence(**options)


def test_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \(C, H, W, D\), got \(1, 1, 4, 4, 4\)"):
        SliceSequence()(torch.rand(1, 1, 4, 4, 4))


# Dictionaries


def test_a_loader_makes_batches_of_slabs_that_the_inferer_takes() -> None:
    data = [{"image": volume(1, 5, 6, 11), "label": volume(1, 5, 6, 11)} for _ in range(2)]
    steps = Compose([SliceSequenced(["image", "label"], slab=4)])
    (batch,) = DataLoader(Dataset(data, steps), batch_size=2)
    assert [tuple(part.shape) for part in batch["image"]] == [(2, 1, 5, 6, 4), (2, 1, 5, 6, 4), (2, 1, 5, 6, 3)]
    net = CLSTMUNet(channels=(2, 3)).eval()
    together = torch.cat(list(SlabInferer()(batch["image"], net)), -1)
    stacked = torch.stack([d["image"].as_tensor() for d in data])
    with torch.no_grad():
        torch.testing.assert_close(together.as_subclass(torch.Tensor), net(stacked))


def test_the_dictionary_version_goes_back_and_shares_its_names() -> None:
    assert SliceSequenceDict is SliceSequenced
    data = {"image": volume(), "other": 3}
    cut = SliceSequenced("image", slab=4, overlap=1)
    there = cut(data)
    assert there["other"] == 3
    back = cut.inverse(there)
    assert torch.equal(back["image"], data["image"])
    steps = Compose([cut])
    assert torch.equal(steps.inverse(steps(data))["image"], data["image"])


def test_volumes_must_share_their_slices() -> None:
    other = volume(2, 5, 6, 11)
    other.affine[2, 2] = 4.0
    cut = SliceSequenced(["image", "label"], allow_missing_keys=True)
    with pytest.raises(ValueError, match=r"must share slices: .* \(11, 3\.0\) and \(11, 4\.0\) \(label\)"):
        cut({"image": volume(), "label": other})
    with pytest.raises(ValueError, match=r"\(11, 3\.0\) and \(10, 3\.0\)"):
        cut({"image": volume(), "label": volume(1, 5, 6, 10)})
    assert set(cut({"image": volume()})) == {"image"}

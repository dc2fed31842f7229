"""Scans come onto a small grid with a target, whatever they are; what has none is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.apps.systems.scan import IGNORED, Scan, grid_shape, prepare_scan
from monai_memeff.errors import InputError


def test_a_labeled_ct_keeps_its_classes_and_hides_a_quarter(scan: Scan) -> None:
    assert scan.target.numel() <= 20_000
    assert all(n % 8 == 0 and n >= 16 for n in scan.target.shape)
    assert scan.image.shape == (1, 2, *scan.target.shape)
    assert scan.names[3] == "skull"
    assert 0.15 < float(scan.hidden.float().mean()) < 0.35
    assert (scan.training[0, 0][scan.hidden] == IGNORED).all()
    np.testing.assert_array_equal(scan.training[0, 0][~scan.hidden], scan.target[~scan.hidden])
    assert 0.2 < scan.occupancy < 0.9
    assert len(scan.hidden.movedim(scan.axis, 0).flatten(1).float().mean(1).unique()) == 2  # whole slices


def test_without_a_label_a_ct_gives_bone_and_an_mri_its_foreground(ct: MetaTensor, mr: MetaTensor) -> None:
    bone = prepare_scan(ct, None, "ct", voxels=20_000)
    assert bone.names == ("bone",)
    assert "300 HU" in bone.task
    assert "easy target" in bone.task
    assert bone.occupancy < 0.35
    assert bone.active[bone.target > 0].float().mean() == 1
    ball = prepare_scan(mr, None, "mr", voxels=20_000)
    assert ball.names == ("foreground",)
    assert "Otsu" in ball.task
    assert ball.image.shape[1] == 1
    assert ball.target.shape[2] <= 24  # thick slices are not cut finer
    middle = [n // 2 for n in ball.target.shape]
    assert ball.target[tuple(middle)] == 1
    assert ball.target[0, 0, 0] == 0


def test_a_threshold_holds_for_any_image_without_a_label(ct: MetaTensor, mr: MetaTensor) -> None:
    dense = prepare_scan(ct, None, "ct", threshold=700.0, voxels=20_000)
    assert "voxels above 700 HU" in dense.task
    ball = prepare_scan(mr, None, "mr", threshold=160.0, voxels=20_000)
    assert "voxels above 160 (the image is no CT" in ball.task
    assert 0 < int(ball.target.sum()) < 0.7 * int(prepare_scan(mr, None, "mr", voxels=20_000).target.sum())


def test_labels_with_gaps_and_other_orientations_stay_in_place(ct: MetaTensor, label: MetaTensor) -> None:
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    flip[0, 3] = ct.shape[1] - 1
    turned = [MetaTensor(v.as_tensor().flip(1), affine=v.affine @ flip) for v in (ct, label * 7)]
    one, other = prepare_scan(ct, label, "a", voxels=20_000), prepare_scan(*turned, "b", voxels=20_000)
    np.testing.assert_array_equal(one.target, other.target)
    np.testing.assert_allclose(one.image, other.image, atol=1e-6)
    assert other.names[0] == "label 7"


def test_a_grid_is_as_fine_as_allowed_and_never_finer_than_the_image() -> None:
    for extents, steps in (
        ([512, 512, 234], (0.5, 0.5, 1.0)),
        ([256, 256, 25], (0.9, 0.9, 6.5)),
        ([20, 20, 20], (2,) * 3),
    ):
        shape, step_mm = grid_shape(extents, steps, 100_000)
        assert np.prod(shape) <= 100_000
        assert all(n % 8 == 0 for n in shape)
        np.testing.assert_allclose(np.array(shape) * step_mm, np.array(extents) * steps)
        assert all(mm > 0.7 * own for mm, own in zip(step_mm, steps, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:, :15], "15 x 56 x 60 voxels, and at least 16"),
        (lambda v: v.where(v > -900, torch.nan), "NaN or infinite"),
        (lambda v: torch.zeros_like(v), "the value 0 everywhere"),
    ],
)
def test_what_is_no_scan_is_refused(ct: MetaTensor, change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_scan(MetaTensor(change(ct.as_tensor()), affine=ct.affine), None, "it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:, :, :, :-1], "the label has 46 x 56 x 59 voxels and it 46 x 56 x 60"),
        (lambda v: torch.zeros_like(v), "the label is empty"),
        (lambda v: v + 0.5, "fractions"),
        (lambda v: v - 2, "negative"),
        (lambda v: v + 2 * torch.arange(60.0), "at most 64"),
    ],
)
def test_what_is_no_label_is_refused(ct: MetaTensor, label: MetaTensor, change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_scan(ct, MetaTensor(change(label.as_tensor()), affine=label.affine), "it")


def test_a_label_elsewhere_and_a_threshold_that_finds_nothing_are_refused(ct: MetaTensor, label: MetaTensor) -> None:
    moved = label.affine.clone()
    moved[0, 3] += 3
    with pytest.raises(InputError, match="the label's affine"):
        prepare_scan(ct, MetaTensor(label.as_tensor(), affine=moved), "it")
    with pytest.raises(InputError, match="0% of the voxels lie above 9000"):
        prepare_scan(ct, None, "it", threshold=9000)

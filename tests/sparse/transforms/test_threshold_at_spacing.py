"""Bone at another spacing: against MONAI's Spacing and AsDiscrete, bent axes, slabs, inverse, memory, a real head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import AsDiscrete, Compose, CopyItemsd, Invertd, KeepLargestConnectedComponent, LoadImage, Spacing
from scipy import ndimage

from monai_memeff.memory import measure_peak
from monai_memeff.sparse.transforms import threshold_at_spacing as bone_spacing
from monai_memeff.sparse.transforms.threshold_at_spacing import (
    ThresholdAtSpacing,
    ThresholdAtSpacingD,
    ThresholdAtSpacingd,
    ThresholdAtSpacingDict,
)

AFFINES = {
    "1 mm": np.eye(4),
    "anisotropic": np.diag([0.7, 0.8, 2.1, 1.0]),
    "flipped": np.diag([-0.7, -0.7, 1.5, 1.0]),
    "turned": np.array([[0.8, -0.6, 0, 9], [0.6, 0.8, 0, -4], [0, 0, 1.7, 30], [0, 0, 0, 1.0]]),
    "sheared": np.array([[0.8, 0, 0, 9], [0, 0.8, 0.5, -4], [0, 0, 1.7, 30], [0, 0, 0, 1.0]]),
}


@pytest.fixture
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs in small volumes too."""
    monkeypatch.setattr(bone_spacing, "SLAB", 700)


def ct(affine: np.ndarray, seed: int = 0, corner: bool = False) -> MetaTensor:
    """(1, 19, 15, 17) smooth whole numbers about a threshold of 300; with ``corner`` bone is in one corner only."""
    values = ndimage.gaussian_filter(np.random.RandomState(seed).normal(size=(19, 15, 17)), 1.2) * 2500
    if corner:
        values[6:] = values[:, 5:] = -1000
    return MetaTensor(torch.from_numpy(values.round()).float()[None], affine=affine)


def by_monai(image: MetaTensor, pixdim: float, threshold: float = 300) -> MetaTensor:
    """What the transform stands for."""
    return AsDiscrete(threshold=threshold)(Spacing([pixdim] * 3)(image))


@pytest.mark.usefixtures("_small_slabs")
@pytest.mark.parametrize("corner", [False, True])
@pytest.mark.parametrize("pixdim", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_it_is_spacing_and_a_threshold(affine: np.ndarray, pixdim: float, corner: bool) -> None:
    image = ct(affine, corner=corner)
    before = image.clone()
    bone, expected = ThresholdAtSpacing(pixdim, 300)(image), by_monai(image, pixdim)
    assert bone.dtype == torch.uint8
    assert int(bone.sum()) > 0
    assert torch.equal(bone.as_tensor(), expected.as_tensor().byte())
    torch.testing.assert_close(bone.affine, expected.affine)
    assert torch.equal(image, before)


@pytest.mark.usefixtures("_small_slabs")
@pytest.mark.parametrize("pixdim", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_the_inverse_is_that_of_spacing(affine: np.ndarray, pixdim: float) -> None:
    image = ct(affine)
    ours, theirs = ThresholdAtSpacing(pixdim, 300), Spacing([pixdim] * 3)
    bone = ours(image)
    piece = torch.zeros_like(bone.as_tensor()).float()
    piece[:, 3:7, 2:6, 2:8] = 1
    back = ours.inverse(MetaTensor(piece).copy_meta_from(bone))
    expected = theirs.inverse(MetaTensor(piece).copy_meta_from(theirs(image)))
    assert back.dtype == torch.float32
    torch.testing.assert_close(back.as_tensor(), expected.as_tensor(), atol=1e-6, rtol=0)
    torch.testing.assert_close(back.affine, image.affine)
    assert back.applied_operations == []


@pytest.mark.parametrize(("threshold", "share"), [(1e5, 0.0), (-1e5, 1.0)], ids=["no bone", "all bone"])
def test_extreme_thresholds(threshold: float, share: float) -> None:
    bone = ThresholdAtSpacing(0.6, threshold, components=1)(ct(AFFINES["turned"]))
    assert float(bone.float().mean()) == share


@pytest.mark.parametrize("components", [1, 3])
def test_it_keeps_the_largest_pieces_of_every_channel(components: int) -> None:
    image = torch.cat([ct(AFFINES["anisotropic"], seed) for seed in range(2)])
    bone = ThresholdAtSpacing(0.9, 300, components)(image)
    largest = KeepLargestConnectedComponent(applied_labels=1, num_components=components, is_onehot=False)
    for channel in range(2):
        expected = largest(by_monai(image[channel : channel + 1], 0.9))
        assert torch.equal(bone[channel].as_tensor(), expected[0].as_tensor().byte())
        assert ndimage.label(bone[channel].numpy(), np.ones((3, 3, 3)))[1] == components


@pytest.mark.parametrize("transform", [ThresholdAtSpacingd, ThresholdAtSpacingD, ThresholdAtSpacingDict])
@pytest.mark.parametrize("nearest", [False, True])
def test_dictionary_and_invertd(transform: type, nearest: bool) -> None:
    steps = Compose([transform(["image", "absent"], 0.8, 300, 1, allow_missing_keys=True)])
    image = ct(AFFINES["sheared"])
    data = steps({"image": image, "other": 1})
    assert torch.equal(data["image"], ThresholdAtSpacing(0.8, 300, 1)(image))
    assert data["other"] == 1
    data = CopyItemsd("image", names="pred")(data)
    back = Invertd("pred", steps, orig_keys="image", nearest_interp=nearest)(data)["pred"]
    assert back.shape == image.shape
    torch.testing.assert_close(torch.as_tensor(back.affine), image.affine)
    assert set(back.unique().tolist()) <= {0.0, 1.0} if nearest else len(back.unique()) > 2
    overlap = (back >= 0.5) & (image >= 300)
    assert int(overlap.sum()) > 0.8 * int((back >= 0.5).sum())


def test_a_plain_tensor_has_voxels_of_one_millimeter() -> None:
    image = ct(AFFINES["1 mm"])
    assert torch.equal(
        ThresholdAtSpacing([0.5, 1, -1], 300)(image.as_tensor()), ThresholdAtSpacing([0.5, 1, -1], 300)(image)
    )


def test_wrong_arguments_say_so() -> None:
    with pytest.raises(ValueError, match="components must not be negative, got -1"):
        ThresholdAtSpacing(1.0, 300, -1)
    with pytest.raises(ValueError, match=r"channel first \(C, H, W, D\), got \(4, 4, 4\)"):
        ThresholdAtSpacing(1.0, 300)(torch.zeros(4, 4, 4))


@pytest.mark.slow
def test_it_holds_a_byte_per_voxel_and_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CT at half its spacing; MONAI's way holds 64-bit coordinates of all its voxels."""
    monkeypatch.setattr(bone_spacing, "SLAB", 20_000)
    image = MetaTensor(torch.full((1, 64, 64, 40), -1000.0))
    image[:, 10:50, 20:40, 10:30] = 1000.0
    peaks = []
    for run in (lambda: by_monai(image, 0.5), lambda: ThresholdAtSpacing(0.5, 300)(image)):
        with measure_peak() as meter:
            run()
        peaks.append(meter.peak_bytes)
    fine = 127 * 127 * 79
    assert peaks[0] > 24 * fine
    assert peaks[1] < 4 * fine


@pytest.mark.slow
def test_a_real_head(data_dir: Path) -> None:
    image = LoadImage(ensure_channel_first=True)(data_dir / "head_ct" / "philips_skull_phantom_bone1mm.nii.gz")
    bone, expected = ThresholdAtSpacing(1.2, 300)(image), by_monai(image, 1.2)
    assert int(bone.sum()) > 50_000
    assert torch.equal(bone.as_tensor(), expected.as_tensor().byte())

"""Shells, the upper skull and its face: against plain loops and the authors' recipe; affine, inverse, a real head."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImage, Orientation
from scipy import ndimage

from monai_memeff.apps.skull.phantom import head_phantom
from monai_memeff.apps.skull.shell import SkullShell, SkullShellD, SkullShelld, SkullShellDict
from monai_memeff.apps.skull.upper_skull import UpperSkullCrop, UpperSkullCropD, UpperSkullCropd, UpperSkullCropDict

SHAPE = (7, 9, 8)


def blob(seed: int = 0, channels: int = 1, fraction: float = 0.75) -> torch.Tensor:
    """(C, 7, 9, 8) float, thick enough to have an inside, touching the border."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(channels, *SHAPE, generator=generator) < fraction).float()


def head(flip_y: bool = False) -> MetaTensor:
    """A generated skull (1, 74, 90, 96) at 2.5 mm in RAS, or with y running backwards."""
    phantom = head_phantom(shape=(74, 90, 96), spacing=2.5)
    skull = MetaTensor((phantom.image[None] > 300).float(), affine=phantom.affine)
    return Orientation(axcodes="RPS")(skull) if flip_y else skull


def surface(mask: np.ndarray, steps: int) -> np.ndarray:
    """Voxels of a mask with a voxel outside it within ``steps`` moves along the axes, by looking at each."""
    ball = [s for s in product(range(-steps, steps + 1), repeat=3) if sum(map(abs, s)) <= steps]
    found = np.zeros_like(mask)
    for place in np.argwhere(mask):
        around = [place + np.array(step) for step in ball]
        found[tuple(place)] = any(
            not all(0 <= c < n for c, n in zip(p, mask.shape, strict=True)) or not mask[tuple(p)] for p in around
        )
    return found


def authors_cut(skull: np.ndarray, face: int, keep: int) -> np.ndarray:
    """The recipe of the paper's preparation, in numpy, face at low y."""
    places = np.argwhere(skull)
    first, last = places.min(0), places.max(0)
    upper = skull[:, :, : last[2] + 1][:, :, -(keep + int(skull.shape[2] * 0.05)) :].copy()
    upper[:, : first[1] + face] = 0
    return upper


# Shells


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_shell_by_looking_at_every_neighbor(steps: int, channels: int) -> None:
    skull = blob(channels=channels, fraction=0.97)
    before = skull.clone()
    shell = SkullShell(steps, first_slices=0)(skull)
    expected = np.stack([surface(channel.numpy() > 0, steps) for channel in skull])
    assert torch.equal(shell > 0, torch.from_numpy(expected))
    assert 0 < int((shell > 0).sum()) < int((skull > 0).sum())
    assert torch.equal(skull, before)


def test_the_lowest_slices_are_emptied() -> None:
    skull = torch.ones(1, *SHAPE)
    assert not bool(SkullShell()(skull)[..., 0].any())
    assert bool(SkullShell()(skull)[..., 1].any())
    assert not bool(SkullShell(2)(skull)[..., :2].any())
    assert not bool(SkullShell(1, first_slices=3)(skull)[..., :3].any())
    assert bool(SkullShell(1, first_slices=0)(skull)[..., 0].all()), "the border counts as surface"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float64])
def test_dtype_values_and_metadata_are_kept(dtype: torch.dtype) -> None:
    affine = torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    skull = MetaTensor((blob() * 5).to(dtype), affine=affine)
    shell = SkullShell()(skull)
    assert shell.dtype == dtype
    assert torch.equal(shell.affine, affine)
    assert set(shell.unique().tolist()) == set(skull.unique().tolist())
    assert torch.equal(SkullShell()(np.asarray(skull)), shell.as_tensor())


def test_an_empty_skull_has_an_empty_shell() -> None:
    assert not bool(SkullShell()(torch.zeros(1, *SHAPE)).any())


def test_the_target_has_a_dense_implant() -> None:
    skull = blob(fraction=0.99)
    implant = torch.zeros_like(skull)
    implant[:, 2:5, 2:6, 3:7] = skull[:, 2:5, 2:6, 3:7]
    data = {"defective": skull - implant, "implant": implant, "case": 7}
    result = SkullShelld("defective", implant_key="implant", target_key="complete")(data)
    shell = SkullShell()(skull - implant)
    assert torch.equal(result["defective"], shell)
    assert torch.equal(result["complete"], shell + implant)
    assert result["implant"] is implant
    assert result["case"] == 7
    assert set(data) == {"defective", "implant", "case"}
    both = SkullShelld(("defective", "implant"))(data)
    assert int(both["implant"].sum()) < int(implant.sum()), "without implant_key every key becomes a shell"
    assert SkullShelld("absent", allow_missing_keys=True)(data) == data
    assert SkullShellD is SkullShellDict is SkullShelld


# The upper skull


@pytest.mark.parametrize("z", [60, 96])
@pytest.mark.slow
def test_the_crop_is_the_authors(z: int) -> None:
    """Top and face are those of the recipe; in RAS the face is at the other end of y."""
    skull = head().as_tensor()[..., -z:].contiguous()
    low = skull.flip(2)
    expected = authors_cut(low[0].numpy(), face=12, keep=30)
    assert 0 < expected.sum() < skull.sum()
    cut = UpperSkullCrop(keep=30, face=12, front="low")(low)
    assert cut[0].numpy().tolist() == expected.tolist()
    ours = UpperSkullCrop(keep=30, face=12)(skull)
    assert torch.equal(ours.as_tensor().flip(2), cut.as_tensor())


def test_front_and_spacing_come_from_the_affine() -> None:
    forward, backward = head(), head(flip_y=True)
    crop = UpperSkullCrop(keep=40, face=99, face_mm=50.0)
    ahead, back = crop(forward), crop(backward)
    assert torch.equal(ahead.as_tensor(), back.as_tensor().flip(2))
    voxels = UpperSkullCrop(keep=40, face=20)(forward)
    assert torch.equal(ahead.as_tensor(), voxels.as_tensor()), "50 mm are 20 voxels of 2.5 mm"
    whole = UpperSkullCrop(keep=40, face=0)(forward)
    foremost = int(torch.nonzero(forward[0].as_tensor())[:, 1].max())
    assert bool(whole.as_tensor()[:, :, foremost - 19 :].any())
    assert not bool(voxels.as_tensor()[:, :, foremost - 19 :].any())
    assert torch.equal(whole.as_tensor()[:, :, : foremost - 19], voxels.as_tensor()[:, :, : foremost - 19])


def test_the_affine_follows_and_the_inverse_pads() -> None:
    skull = head()
    crop = UpperSkullCrop(keep=20, fraction=0.1, face=10)
    cut = crop(skull)
    top = int(torch.nonzero(skull[0].as_tensor())[:, 2].max()) + 1
    bottom = top - 20 - 9
    assert cut.shape == (1, 74, 90, 29)
    corner = skull.affine @ torch.tensor([0.0, 0, bottom, 1]).double()
    torch.testing.assert_close(cut.affine[:, 3], corner)
    back = crop.inverse(cut)
    assert back.shape == skull.shape
    torch.testing.assert_close(back.affine, skull.affine)
    assert torch.equal(back.as_tensor()[..., bottom:top], cut.as_tensor())
    assert not bool(back.as_tensor()[..., :bottom].any())
    assert torch.equal(skull, head()), "the input is left as it is"


def test_margins_and_short_volumes() -> None:
    skull = torch.zeros(1, 5, 6, 20)
    skull[..., 3:11] = 1
    crop = {"fraction": 0.0, "face": 0}
    assert UpperSkullCrop(keep=4, **crop)(skull).shape[3] == 4
    assert UpperSkullCrop(keep=4, top_margin=3, **crop)(skull).shape[3] == 7
    assert UpperSkullCrop(keep=4, top_margin=99, **crop)(skull).shape[3] == 13
    assert UpperSkullCrop(**crop)(skull).shape[3] == 11
    assert not bool(UpperSkullCrop(fraction=0.0, face=6)(skull).any()), "a face as deep as the skull leaves nothing"


def test_a_pair_stays_together() -> None:
    """The defect is at the vertex: cropped each by itself, the two would no longer lie on one grid."""
    complete = head()
    top = int(torch.nonzero(complete[0].as_tensor())[:, 2].max())
    defective = complete.clone()
    defective[..., top - 6 :] = 0
    data = {"defective": defective, "complete": complete}
    options = {"keep": 30, "face": 10}
    by_complete = UpperSkullCropd(("defective", "complete"), source_key="complete", **options)(data)
    by_defective = UpperSkullCropd(("defective", "complete"), top_margin=7, **options)(data)
    for result, height in ((by_complete, 34), (by_defective, 41)):
        assert result["defective"].shape == result["complete"].shape == (1, 74, 90, height)
        assert torch.equal(result["defective"].affine, result["complete"].affine)
    assert torch.equal(by_complete["complete"].as_tensor()[..., -1], by_defective["complete"].as_tensor()[..., -1])
    assert set(data) == {"defective", "complete"}
    assert data["complete"] is complete
    assert UpperSkullCropD is UpperSkullCropDict is UpperSkullCropd


def test_a_pipeline_and_its_inverse() -> None:
    complete = head()
    pipeline = Compose([UpperSkullCropd("skull", keep=40, face=0), SkullShelld("skull")])
    out = pipeline({"skull": complete})
    back = pipeline.inverse(out)["skull"]
    assert back.shape == complete.shape
    assert torch.equal(back.affine, complete.affine)
    assert torch.equal(pipeline({"skull": complete})["skull"], out["skull"])
    lazy = Compose([UpperSkullCropd("skull", keep=40, face=0), SkullShelld("skull")], lazy=True)({"skull": complete})
    assert torch.equal(lazy["skull"].as_tensor(), out["skull"].as_tensor())


def lying_down() -> MetaTensor:
    return Orientation(axcodes="RSA")(head())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SkullShell(0), "steps must be a whole number of at least 1"),
        (lambda: SkullShell(first_slices=-1), "first_slices must be a whole number of at least 0"),
        (lambda: SkullShell()(torch.ones(4, 4, 4)), r"channel first \(C, H, W, D\), got \(4, 4, 4\)"),
        (lambda: SkullShelld(("a", "b"), implant_key="i"), "one defective skull, got 2"),
        (lambda: SkullShelld("skull", implant_key="i", target_key="skull_target"), "takes for metadata; rename"),
        (lambda: UpperSkullCrop(keep=0), "keep must be a whole number of at least 1"),
        (lambda: UpperSkullCrop(face_mm=-1.0), "face_mm must be a finite number of at least 0"),
        (lambda: UpperSkullCrop(front="left"), "front must be one of high, low or None, got 'left'"),
        (lambda: UpperSkullCrop()(torch.zeros(1, 4, 4, 4)), "empty, so it has no top; check the threshold"),
        (lambda: UpperSkullCrop()(torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 5)), "must share a grid"),
        (lambda: UpperSkullCrop()(lying_down()), r"bring the volume to RAS with MONAI's Orientation"),
        (lambda: UpperSkullCrop()(Orientation(axcodes="RAI")(head())), "z not upwards"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# A real head


@pytest.mark.slow
def test_a_real_head(data_dir: Path) -> None:
    """512 x 512 x 234 at 1 mm, y stored backwards: from 589 thousand voxels of skull to 125 thousand of upper shell."""
    image = LoadImage(ensure_channel_first=True)(data_dir / "head_ct" / "vhf_head_ct.nii.gz")
    skull = (image > 300).to(torch.uint8)
    assert float(skull.affine[1, 1]) < 0
    shell = SkullShell()(skull)
    plain = skull[0].as_tensor().numpy() > 0
    expected = plain ^ ndimage.binary_erosion(plain)
    expected[:, :, 0] = False
    assert torch.equal(shell[0].as_tensor() > 0, torch.from_numpy(expected))
    upper = UpperSkullCropd(("shell", "skull"), source_key="skull", face_mm=43.0)({"shell": shell, "skull": skull})
    counts = [int(v.as_tensor().sum()) for v in (skull, shell, upper["skull"], upper["shell"])]
    assert counts == [588_900, 227_348, 374_471, 124_627]
    authors = authors_cut(shell[0].as_tensor().numpy(), face=43, keep=126)
    assert upper["shell"].shape == (1, 512, 512, 137)
    assert torch.equal(upper["shell"][0].as_tensor(), torch.from_numpy(authors))

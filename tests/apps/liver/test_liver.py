"""Lesion scores, the intensity mapping of the bundle, and synthetic tumors."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from monai_memeff.apps.liver import LesionDiceMetric, RandTumorSynthesis, RandTumorSynthesisd
from monai_memeff.apps.liver.tumor_synthesis import _box_mean
from tests.bundles.conftest import ROOT


def test_both_scores() -> None:
    truth, guess = torch.zeros(3, 1, 4, 1, 1), torch.zeros(3, 1, 4, 1, 1)
    truth[0, 0, :2], guess[0, 0, 1:3], truth[1, 0, :1], guess[2, 0, 0] = 2, 2, 2, 1
    per_case, overall = LesionDiceMetric(), LesionDiceMetric(overall=True)
    for metric in (per_case, overall):
        metric(y_pred=guess[:2], y=truth[:2])
        metric(y_pred=torch.nn.functional.one_hot(guess[2:, 0].long(), 3).movedim(-1, 1), y=truth[2:])
    assert float(per_case.aggregate()) == pytest.approx((0.5 + 0 + 1) / 3)
    assert float(overall.aggregate()) == pytest.approx(2 * 1 / (2 + 2 + 1))
    per_case.reset()
    with pytest.raises(ValueError, match="no case"):
        per_case.aggregate()


def test_intensities() -> None:
    """The bundle's own mapping is the published clip(HU / 1024 + 0.5)."""
    config = ConfigParser.load_config_file(str(ROOT / "bundles" / "liver_tumor_halo" / "configs" / "inference.json"))
    (step,) = (t for t in config["preprocessing"]["transforms"] if t["_target_"].endswith("ScaleIntensityRanged"))
    mapping = ConfigParser({"step": step}).get_parsed_content("step")
    image = torch.arange(-2000.0, 3000.0)[None]
    torch.testing.assert_close(mapping({"image": image})["image"], (image / 1024 + 0.5).clamp(0, 1), rtol=0, atol=0)


def liver() -> tuple[torch.Tensor, torch.Tensor]:
    """A bright liver with one dark lesion."""
    label = torch.zeros(1, 64, 48, 40)
    label[:, 8:56, 8:40, 8:32] = 1
    label[:, 20:28, 20:28, 12:20] = 2
    image = torch.zeros_like(label)
    image[label == 1], image[label == 2] = 0.6, 0.5
    return image, label


def test_tumors_move_and_keep_their_contrast() -> None:
    image, label = liver()
    synthesis = RandTumorSynthesisd("image", "label", prob=1.0).set_random_state(3)
    result = synthesis({"image": MetaTensor(image), "label": label})
    new, kinds = result["image"], result["label"]
    assert isinstance(new, MetaTensor)
    assert set(kinds.unique().tolist()) == {0, 1, 2}
    assert torch.equal(kinds > 0, label > 0)
    fake = (kinds == 2).float()
    assert not torch.equal(kinds, label)
    difference = 1.15 * (0.6 - 0.5)
    change = difference * (_box_mean((label == 2).float()[0], 2) - _box_mean(fake[0], 2))
    torch.testing.assert_close(new.as_tensor()[0], image[0] + change)
    again = RandTumorSynthesisd("image", "label", prob=1.0).set_random_state(3)({"image": image, "label": label})
    assert torch.equal(again["label"], kinds)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_image_and_label_keep_their_place_in_space(prob: float) -> None:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    image, label = (MetaTensor(volume, affine=affine) for volume in liver())
    for volume in RandTumorSynthesis(prob).set_random_state(0)(image, label):
        assert isinstance(volume, MetaTensor)
        assert torch.equal(volume.affine, affine)


def test_nothing_is_painted_without_a_darker_lesion() -> None:
    image, label = liver()
    synthesis = RandTumorSynthesis(prob=1.0).set_random_state(0)
    for i, k in ((image, (label > 0).float()), (-image, label), (image, torch.zeros_like(label))):
        got = synthesis(i, k)
        assert torch.equal(got[0], i)
        assert torch.equal(got[1], k)
    assert torch.equal(RandTumorSynthesis(prob=0.0)(image, label)[0], image)
    with pytest.raises(ValueError, match=r"prob must be a finite number in 0 \.\.\. 1, got 2"):
        RandTumorSynthesis(prob=2)

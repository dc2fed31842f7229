"""The paper's parts: U-Net size, loss, scores, intensity mapping, synthetic tumors, each rank's box."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.halo import (
    HounsfieldToUnitd,
    Hub,
    LesionDiceMetric,
    LiverTumorLoss,
    PartitionCrop,
    PartitionCropd,
    RandTumorSynthesis,
    RandTumorSynthesisd,
    SpatialLoss,
    VolumeUNet,
    scatter,
    verify,
    virtual_mesh,
)  # fmt: skip
from monai_memeff.halo.transforms import _box_mean
from monai_memeff.halo.unet import FEATURES


@pytest.mark.parametrize(("side", "millions"), [(64, 178.7), (128, 183.4), (256, 184.5), (512, 184.8)])
def test_the_published_number_of_parameters(side: int, millions: float) -> None:
    with torch.device("meta"):
        network = VolumeUNet(features=FEATURES[side])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_the_published_network_in_parts_equals_the_whole_and_learns_with_adafactor() -> None:
    network = VolumeUNet(features=(2, 4, 8), convs=2, dropout=0.0)
    assert verify(network, (1, 1, 16, 8, 8), (2, 2)) < 1e-10
    optimizer = torch.optim.Adafactor(network.parameters(), lr=0.003)
    x, y = torch.randn(1, 1, 8, 8, 8), torch.randint(0, 3, (1, 1, 8, 8, 8))
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        values.append(LiverTumorLoss()(network(x), y))
        values[-1].backward()
        optimizer.step()
    assert float(values[-1]) < float(values[0])


def test_loss_by_hand_and_in_parts() -> None:
    x, y = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.randint(0, 3, (2, 1, 4, 5, 6))
    p = x.softmax(1)
    entropy = sum(-math.log(p[b, c, i, j, k]) * (1, 8, 16)[c] for (b, _, i, j, k), c in np.ndenumerate(y.numpy()))
    t = (y[:, 0] == 2).double()
    hit, size = (p[:, 2] * t).sum((1, 2, 3)), (p[:, 2] + t).sum((1, 2, 3))
    dice = ((2 * hit / (size + 0.1)).mean() + 2 * hit.sum() / (size.sum() + 0.1)) / 2
    expected = 0.8 * entropy / y.numel() - 0.2 * float(dice)
    assert float(LiverTumorLoss()(x, y)) == pytest.approx(expected, rel=1e-12)
    hub = Hub(2)
    mesh = virtual_mesh(hub, (2,))
    values = hub.run(lambda _: SpatialLoss(LiverTumorLoss(), mesh)(scatter(x, mesh), scatter(y, mesh)))
    assert all(float(v) == pytest.approx(expected, rel=1e-12) for v in values)


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
    image = torch.tensor([[-2000.0, -512.0, 0.0, 256.0, 3000.0]])
    assert HounsfieldToUnitd("image")({"image": image})["image"].tolist() == [[0, 0, 0.5, 0.75, 1]]


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


def test_nothing_is_painted_without_a_darker_lesion() -> None:
    image, label = liver()
    synthesis = RandTumorSynthesis(prob=1.0).set_random_state(0)
    for i, k in ((image, (label > 0).float()), (-image, label), (image, torch.zeros_like(label))):
        got = synthesis(i, k)
        assert torch.equal(got[0], i)
        assert torch.equal(got[1], k)
    assert torch.equal(RandTumorSynthesis(prob=0.0)(image, label)[0], image)
    with pytest.raises(ValueError, match="within"):
        RandTumorSynthesis(prob=2)


def test_each_rank_reads_its_own_box(tmp_path: object) -> None:
    volume = np.random.default_rng(0).random((1, 9, 6, 4), dtype=np.float32)
    np.save(f"{tmp_path}/volume.npy", volume)
    affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    hub = Hub(2)
    mesh = virtual_mesh(hub, (2,))

    def work(_rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mapped = PartitionCrop(mesh)(np.load(f"{tmp_path}/volume.npy", mmap_mode="r"))
        cropped = PartitionCropd("image", mesh)({"image": MetaTensor(volume, affine=affine)})["image"]
        return mapped, cropped.as_tensor(), cropped.affine

    (a, b, first), (c, d, second) = hub.run(work)
    np.testing.assert_array_equal(torch.cat([a, c], 1), volume)
    np.testing.assert_array_equal(torch.cat([b, d], 1), volume)
    assert first[0, 3] == 0
    assert second[0, 3] == 2 * 4

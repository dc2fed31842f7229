"""The paper's parts: U-Net size, the loss in parts, each rank's box."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.apps.liver import LiverTumorLoss
from monai_memeff.halo import PartitionCrop, PartitionCropd, SpatialLoss, VolumeUNet, scatter
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.unet import FEATURES
from monai_memeff.memory import measure_peak
from tests.halo.ranks.compare import worst
from tests.halo.ranks.threads import run_ranks


@pytest.mark.parametrize(("side", "millions"), [(64, 178.7), (128, 183.4), (256, 184.5), (512, 184.8)])
def test_the_published_number_of_parameters(side: int, millions: float) -> None:
    with torch.device("meta"):
        network = VolumeUNet(features=FEATURES[side])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@pytest.mark.slow
def test_the_published_network_in_parts_equals_the_whole_and_learns_with_adafactor() -> None:
    network = VolumeUNet(features=(2, 4, 8), convs=2, dropout=0.0, use_checkpoint=True)
    x = torch.randn(1, 1, 16, 8, 8, dtype=torch.float64)
    assert worst(copy.deepcopy(network).double(), [x], (2, 2)) < 1e-10
    optimizer = torch.optim.Adafactor(network.parameters(), lr=0.003)
    x, y = torch.randn(1, 1, 8, 8, 8), torch.randint(0, 3, (1, 1, 8, 8, 8))
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        values.append(LiverTumorLoss()(network(x), y))
        values[-1].backward()
        optimizer.step()
    assert float(values[-1]) < float(values[0])


@pytest.mark.slow
def test_recomputing_changes_nothing_but_the_memory() -> None:
    found, peaks = [], []
    for again in (False, True):
        torch.manual_seed(0)
        network = VolumeUNet(1, 3, features=(2, 3, 5), use_checkpoint=again).double()
        x = torch.randn(1, 1, 16, 12, 20, dtype=torch.float64, requires_grad=True)
        with measure_peak() as meter:
            network(x).square().mean().backward()
        state = [*network.state_dict().values(), x.grad, *(p.grad for p in network.parameters()), torch.rand(1)]
        found.append([value for value in state if value is not None])
        peaks.append(meter.peak_bytes)
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))
    assert peaks[1] < 0.3 * peaks[0]


def test_loss_by_hand_and_in_parts() -> None:
    x, y = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.randint(0, 3, (2, 1, 4, 5, 6))
    p = x.softmax(1)
    entropy = sum(-math.log(p[b, c, i, j, k]) * (1, 8, 16)[c] for (b, _, i, j, k), c in np.ndenumerate(y.numpy()))
    t = (y[:, 0] == 2).double()
    hit, size = (p[:, 2] * t).sum((1, 2, 3)), (p[:, 2] + t).sum((1, 2, 3))
    dice = ((2 * hit / (size + 0.1)).mean() + 2 * hit.sum() / (size.sum() + 0.1)) / 2
    expected = 0.8 * entropy / y.numel() - 0.2 * float(dice)
    assert float(LiverTumorLoss()(x, y)) == pytest.approx(expected, rel=1e-12)
    values = run_ranks(lambda mesh: SpatialLoss(LiverTumorLoss(), mesh)(scatter(x, mesh), scatter(y, mesh)))
    assert all(float(v) == pytest.approx(expected, rel=1e-12) for v in values)


def test_each_rank_reads_its_own_box(tmp_path: object) -> None:
    volume = np.random.default_rng(0).random((1, 9, 6, 4), dtype=np.float32)
    np.save(f"{tmp_path}/volume.npy", volume)
    affine = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64))

    def work(mesh: HaloMesh) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mapped = PartitionCrop(mesh)(np.load(f"{tmp_path}/volume.npy", mmap_mode="r"))
        cropped = PartitionCropd("image", mesh)({"image": MetaTensor(volume, affine=affine)})["image"]
        return mapped, cropped.as_tensor(), cropped.affine

    (a, b, first), (c, d, second) = run_ranks(work)
    np.testing.assert_array_equal(torch.cat([a, c], 1), volume)
    np.testing.assert_array_equal(torch.cat([b, d], 1), volume)
    assert first[0, 3] == 0
    assert second[0, 3] == 2 * 4

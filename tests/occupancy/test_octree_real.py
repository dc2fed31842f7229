"""The octree on a real CT with a network trained for a few seconds: dense evaluation, voxel for voxel."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from monai_memeff.occupancy import OccupancyLoss, OccupancyNet, OctreeInferer
from monai_memeff.occupancy.engine import draw_batch
from monai_memeff.occupancy.evaluator import PointEvaluator, labels_of

MIDDLE = (slice(34, 95), slice(30, 101), slice(20, 73))  # 61 x 71 x 53 voxels, none divisible by a stride


def crop(path: Path) -> Tensor:
    """The middle of a volume, (1, 1, 61, 71, 53) float32."""
    return torch.from_numpy(np.asarray(nibabel.load(path).dataobj, dtype=np.float32)[MIDDLE])[None, None]


def train(data_dir: Path, steps: int) -> tuple[OccupancyNet, Tensor]:
    """A network, and the head-and-neck CT whose five organs it has learned."""
    volume = ((crop(data_dir / "openkbp" / "pt_2_ct.nii.gz") + 200) / 700).clamp(0, 1)
    label = crop(data_dir / "openkbp" / "pt_2_oar.nii.gz")
    torch.manual_seed(0)
    network = OccupancyNet(1, 6, variant="interpolated", channels=(8, 16, 32), width=64)
    optimizer, loss = torch.optim.Adam(network.parameters(), lr=5e-3), OccupancyLoss()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 200))
    for _ in range(steps):
        points, values = draw_batch(label, 2048, {"uniform": 0.4, "border": 0.3, "balanced": 0.3}, 5)
        optimizer.zero_grad()
        loss(network(volume, points), (values, label)).backward()
        optimizer.step()
        schedule.step()
    return network.eval(), volume


@pytest.fixture(scope="module")
def trained(data_dir: Path) -> tuple[OccupancyNet, Tensor]:
    """A network after a few steps."""
    return train(data_dir, 40)


@torch.no_grad()
@pytest.mark.exhaustive
def test_same_as_dense_on_a_real_ct_once_trained(data_dir: Path) -> None:
    """A network that has learned its organs answers without islands, and the octree then misses no voxel."""
    with torch.enable_grad():
        network, volume = train(data_dir, 700)
    expected = network(volume).argmax(1, keepdim=True)
    assert expected.unique().tolist() == [0, 1, 2, 3, 4, 5]
    for initial in ("grid", "network"):
        labels = OctreeInferer(initial=initial, stride=4, labels=True)(volume, network)
        assert int((labels != expected).sum()) == 0, initial


def numbered(mask: Tensor) -> Tensor:
    """26-connected components: 1, 2, ... by size, 0 outside the mask."""
    found = torch.from_numpy(ndimage.label(mask.numpy(), np.ones((3, 3, 3)))[0]).long()
    sizes = found.flatten().bincount()[1:]
    rank = torch.zeros(len(sizes) + 1, dtype=torch.long)
    rank[1 + sizes.argsort(descending=True)] = torch.arange(1, len(sizes) + 1)
    return rank[found]


def coarse_labels(network: OccupancyNet, volume: Tensor) -> Tensor:
    """What the network's coarse prediction says of every voxel, (H, W, D)."""
    evaluator, shape = PointEvaluator(network, volume), tuple(volume.shape[2:])
    voxels = torch.cartesian_prod(*(torch.arange(extent) for extent in shape))
    return labels_of(evaluator.coarse_logits(voxels)).view(shape)


@torch.no_grad()
@pytest.mark.parametrize("initial", ["grid", "network"])
@pytest.mark.exhaustive
def test_same_as_dense_on_a_real_ct(trained: tuple[OccupancyNet, Tensor], initial: str) -> None:
    """The largest piece of every organ is that of dense evaluation, voxel for voxel.

    A network trained so briefly sprinkles its answer with islands. Those that hold no node may be missed, and with
    ``initial="network"`` those whose nodes the coarse prediction has wrong; each that is missed is a whole piece of the
    dense answer, and the report counts them. How many there are depends on the training, so on the processor's
    arithmetic; they are few beside the errors of the coarse prediction.
    """
    network, volume = trained
    expected = network(volume)[0].argmax(0)
    inferer = OctreeInferer(initial=initial, stride=4, labels=True, compare_dense=True)
    labels = inferer(volume, network)[0, 0]
    for organ in range(1, 6):
        assert torch.equal(numbered(labels == organ) == 1, numbered(expected == organ) == 1), organ
    wrong = labels != expected
    islands = numbered(wrong)
    coarse = coarse_labels(network, volume)
    nodes = torch.zeros_like(wrong)
    nodes[
        torch.meshgrid(*(torch.tensor([*range(0, extent - 1, 4), extent - 1]) for extent in wrong.shape), indexing="ij")
    ] = True
    assert not (wrong & nodes & ((coarse == expected) | (initial == "grid"))).any()
    for number in range(1, int(islands.max()) + 1):
        piece = islands == number
        (assumed,) = labels[piece].unique()
        whole = numbered(expected != assumed)
        assert torch.equal(piece, whole == whole[piece][0]), "an error is a whole piece of the dense answer"
    report = inferer.last_report
    assert report is not None
    assert report.initial == initial
    assert report.disagreement == int(wrong.sum()) < 0.25 * int((coarse != expected).sum())
    assert report.fraction < 0.1

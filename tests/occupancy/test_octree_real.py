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

MIDDLE = (slice(34, 95), slice(30, 101), slice(20, 73))  # 61 x 71 x 53 voxels, none divisible by a stride


def crop(path: Path) -> Tensor:
    """The middle of a volume, (1, 1, 61, 71, 53) float32."""
    return torch.from_numpy(np.asarray(nibabel.load(path).dataobj, dtype=np.float32)[MIDDLE])[None, None]


@pytest.fixture(scope="module")
def trained(data_dir: Path) -> tuple[OccupancyNet, Tensor, Tensor]:
    """A network, the head-and-neck CT it has seen for some steps, and its five organs."""
    volume = ((crop(data_dir / "openkbp" / "pt_2_ct.nii.gz") + 200) / 700).clamp(0, 1)
    label = crop(data_dir / "openkbp" / "pt_2_oar.nii.gz")
    torch.manual_seed(0)
    network = OccupancyNet(1, 6, variant="default", channels=(8, 16, 32), width=64)
    optimizer, loss = torch.optim.Adam(network.parameters(), lr=5e-3), OccupancyLoss()
    for _ in range(40):
        points, values = draw_batch(label, 2048, {"uniform": 0.4, "border": 0.3, "balanced": 0.3}, 5)
        optimizer.zero_grad()
        loss(network(volume, points), (values, label)).backward()
        optimizer.step()
    return network.eval(), volume, label


def pieces(mask: Tensor) -> list[Tensor]:
    """26-connected components, largest first."""
    numbered, count = ndimage.label(mask.numpy(), np.ones((3, 3, 3)))
    found = [torch.from_numpy(numbered == number) for number in range(1, count + 1)]
    return sorted(found, key=lambda piece: -int(piece.sum()))


@torch.no_grad()
@pytest.mark.parametrize("initial", ["grid", "network"])
def test_same_as_dense_on_a_real_ct(trained: tuple[OccupancyNet, Tensor, Tensor], initial: str) -> None:
    """The largest piece of every organ is that of dense evaluation, voxel for voxel.

    A network trained so briefly sprinkles its answer with islands. Those that hold no node may be missed; each that is
    missed is a whole piece of the dense answer, smaller than a cell's cube from the grid, and the report counts them.
    """
    network, volume, label = trained
    expected = network(volume)[0].argmax(0)
    inferer = OctreeInferer(initial=initial, stride=4, output="labels", compare_dense=True)
    labels = inferer(volume, network)[0, 0]
    for organ in range(1, 6):
        assert torch.equal(pieces(labels == organ)[0], pieces(expected == organ)[0]), organ
    wrong = labels != expected
    for piece in pieces(wrong):
        (assumed,) = labels[piece].unique()
        assert any(torch.equal(piece, whole) for whole in pieces(expected != assumed))
        assert initial == "network" or not piece[::4, ::4, ::4].any()
    report = inferer.last_report
    assert report is not None
    assert report.initial == initial
    assert report.disagreement == int(wrong.sum()) < 0.002 * wrong.numel()
    assert report.share < 0.1

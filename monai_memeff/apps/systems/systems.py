"""The systems that are compared: each a network of about the same size, its loss, and how it labels a whole scan."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from monai_memeff.apps.systems.scan import IGNORED, Scan
from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.occupancy import OccupancyLoss, OccupancyNet, OctreeInferer, RandOccupancyPoints
from monai_memeff.sparse import SparseTensor, SparseUNet

CHANNELS = (8, 16, 32, 64)
POINTS = 2**12
SAMPLING = {"uniform": 0.4, "border": 0.3, "balanced": 0.3}
PARTS = 8
HEAD_SCALE = 10.0


class SegmentationSystem(Protocol):
    """A network with its way to learn a scan and to label it."""

    title: str
    iterations: int
    learning_rate: float
    network: nn.Module

    def loss(self, scan: Scan) -> Tensor:
        """Loss of one training step on the whole scan."""

    def labels(self, scan: Scan) -> Tensor:
        """Labels (H, W, D) of the whole scan."""


def class_weights(scan: Scan) -> Tensor:
    """Weights (K,) of the classes: the inverse root of their number of training voxels, scaled to mean 1."""
    counts = torch.bincount(scan.training.flatten(), minlength=IGNORED + 1)[: scan.classes].float()
    weights = torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0.0)
    return weights / weights[counts > 0].mean()


class DenseSystem:
    """MONAI's U-Net on the whole scan."""

    title, iterations, learning_rate = "dense", 110, 1e-2

    def __init__(self, scan: Scan) -> None:
        self.network = _unet(UNet, scan)
        self.weights = class_weights(scan)

    def loss(self, scan: Scan) -> Tensor:
        """Weighted cross-entropy of the voxels that are not hidden."""
        return _cross_entropy(self.network(scan.image), scan.training[:, 0], self.weights)

    def labels(self, scan: Scan) -> Tensor:
        """The largest class of every voxel."""
        return self.network(scan.image).argmax(1)[0].to(torch.uint8)


class SparseSystem:
    """The same U-Net on the active voxels only."""

    title, iterations, learning_rate = "sparse", 110, 1e-2

    def __init__(self, scan: Scan) -> None:
        self.network = _unet(SparseUNet, scan)
        self.weights = class_weights(scan)

    def _active(self, scan: Scan) -> SparseTensor:
        return SparseTensor.from_dense(scan.image, scan.active[None, None])

    def loss(self, scan: Scan) -> Tensor:
        """Weighted cross-entropy of the active voxels that are not hidden."""
        logits = self.network(self._active(scan)).features
        return _cross_entropy(logits, scan.training[0, 0][scan.active], self.weights)

    def labels(self, scan: Scan) -> Tensor:
        """The largest class of every active voxel, and background elsewhere."""
        found = self.network(self._active(scan))
        labels = torch.zeros(scan.active.shape, dtype=torch.uint8)
        labels[scan.active] = found.features.argmax(1).to(torch.uint8)
        return labels


class OccupancySystem:
    """A network that is trained on drawn points and queried at those of an octree."""

    title, iterations, learning_rate = "occupancy", 450, 3e-3

    def __init__(self, scan: Scan, seed: int) -> None:
        self.network: nn.Module = OccupancyNet(scan.image.shape[1], scan.classes, channels=CHANNELS, width=64, blocks=2)
        self.draw = RandOccupancyPoints(POINTS, SAMPLING, ignore_index=IGNORED)
        self.draw.set_random_state(seed)
        self.criterion = OccupancyLoss(ignore_index=IGNORED)

    def loss(self, scan: Scan) -> Tensor:
        """Cross-entropy of drawn points, with the auxiliary term of the coarse prediction."""
        points, labels = self.draw(scan.training[0])
        return self.criterion(self.network(scan.image, points[None]), (labels[None], scan.training))

    def labels(self, scan: Scan) -> Tensor:
        """Labels queried where they change."""
        return OctreeInferer(POINTS, stride=4, labels=True)(scan.image, self.network)[0, 0].to(torch.uint8)


class CLSTMSystem:
    """A 2D U-Net in a convolutional LSTM that walks along the slices, most activations recomputed in training."""

    title, iterations, learning_rate = "clstm", 100, 1e-2

    def __init__(self, scan: Scan) -> None:
        network = CLSTMUNet(
            3, scan.image.shape[1], scan.classes, CHANNELS, hidden_channels=8, checkpoint="sqrt",
            norm=("group", {"num_groups": 4}),
        )  # fmt: skip
        assert network.head is not None
        with torch.no_grad():  # the hidden state lies in (-1, 1): a head of torch's own scale reaches small logits only
            network.head.weight.mul_(HEAD_SCALE)
        self.network: nn.Module = network
        self.weights = class_weights(scan)

    def loss(self, scan: Scan) -> Tensor:
        """Weighted cross-entropy of the voxels that are not hidden."""
        return _cross_entropy(self.network(scan.image), scan.training[:, 0], self.weights)

    def labels(self, scan: Scan) -> Tensor:
        """The largest class, slab by slab."""
        return SlabInferer(slab=4, labels=True, prefetch=0)(scan.image, self.network)[0, 0].to(torch.uint8)


class HaloSystem:
    """A trained network, run in parts with the result of the whole."""

    title, iterations, learning_rate = "halo", 0, 0.0

    def __init__(self, network: nn.Module, scan: Scan) -> None:
        self.network = network
        axis = max(range(3), key=lambda a: scan.target.shape[a])
        self.inferer = SpatialPartitionInferer(partitions=PARTS, labels=True, axis=axis)

    def loss(self, scan: Scan) -> Tensor:
        """Nothing: it trains as the network itself does."""
        raise AssertionError("the network is trained already")

    def labels(self, scan: Scan) -> Tensor:
        """Labels of the network, a part at a time."""
        return self.inferer(scan.image, self.network)[0, 0].to(torch.uint8)


def _unet(kind: type[UNet] | type[SparseUNet], scan: Scan) -> nn.Module:
    """The U-Net of the comparison, on all voxels or on the active ones."""
    return kind(3, scan.image.shape[1], scan.classes, CHANNELS, (2, 2, 2), num_res_units=1, norm="instance")


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.long(), weights, ignore_index=IGNORED)

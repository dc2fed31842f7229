"""The completion network in three engines on the same skull, each as one step to be timed: sparse, ME's and dense."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from monai_memeff.geometry import key_lists, voxels
from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet, SparseTensor

CHANNELS = {
    "ch1": (8, 8, 16, 16, 32, 32, 64),
    "ch2": (22, 32, 32, 128, 156, 256, 388),
    "ch512": (2, 2, 4, 4, 4, 4, 16),
}
"""The published lists: 0.43, 18.1 and 0.017 million parameters."""


def head(path: str, resolution: int) -> Tensor:
    """(r, r, r / 2) boolean: bone (> 300 HU) of a CT of 512 x 512 x at most 256, a cell is bone where any voxel is."""
    import nibabel

    bone = torch.from_numpy(nibabel.load(path).get_fdata(dtype="float32") > 300)
    height, width, depth = bone.shape
    bone = functional.pad(bone, (256 - depth, 0, 0, 512 - width, 0, 512 - height))
    return functional.max_pool3d(bone[None, None].half().float(), 512 // resolution)[0, 0] > 0


def generated(resolution: int, occupancy: float = 0.12) -> Tensor:
    """(r, r, r / 2) boolean: an ellipsoidal wall that fills ``occupancy`` of the grid."""
    extents = (resolution, resolution, resolution // 2)
    axes = [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2).div(0.46 * n).square() for n in extents]
    radius = axes[0][:, None, None] + axes[1][:, None] + axes[2]
    ball = 4 / 3 * math.pi * 0.46**3
    return (radius <= 1) & (radius > (1 - occupancy / ball) ** (2 / 3))


def with_defect(skull: Tensor) -> Tensor:
    """The skull without a block of its upper right quarter."""
    height, width, depth = skull.shape
    cut = skull.clone()
    cut[height // 2 : height * 3 // 4, width // 3 : width * 2 // 3, depth // 2 :] = False
    return cut


class Case:
    """One skull, complete and with a defect, as coordinates (N, 4) of a batch, and its cells at every stride."""

    def __init__(self, complete: Tensor, batch_size: int) -> None:
        self.shape = tuple(complete.shape)
        self.batch_size = batch_size
        self.complete, self.defective = (
            torch.cat([functional.pad(v.nonzero(), (1, 0), value=n) for n in range(batch_size)])
            for v in (complete, with_defect(complete))
        )

    def cells(self, stride: int) -> tuple[Tensor, tuple[int, ...]]:
        """Sorted keys of the complete skull's cells, and the grid of that stride."""
        shape = tuple(-(-n // stride) for n in self.shape)
        coordinates = self.complete.clone()
        coordinates[:, 1:] //= stride
        return voxels.coordinates_to_keys(coordinates, shape).unique(), shape


class Perfect(nn.Module):
    """A head whose logits have the sign that a trained network would give them: the level's size is a real one's."""

    def __init__(self, head: nn.Module, case: Case, stride: int) -> None:
        super().__init__()
        self.head = head
        self.keys, self.shape = case.cells(stride)

    @property
    def weight(self) -> Tensor:
        """The weight of the head that is replaced, whose dtype the network reads."""
        return self.head.weight

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve, then correct the signs."""
        logits = self.head(x)
        return logits.replace(signed(logits.features, key_lists.contains(self.keys, x.voxels.keys, x.voxels.cells)))


def signed(logits: Tensor, wanted: Tensor) -> Tensor:
    """(N, 1) logits, positive where ``wanted`` (N,), else negative."""
    return logits.abs() * (2 * wanted[:, None].to(logits.dtype) - 1)


class SparseStep:
    """Ours; the voxel sets are made anew at every step."""

    def __init__(self, case: Case, channels: str, mode: str, options: dict) -> None:
        self.case, self.mode, self.amp = case, mode, options["amp"]
        self.net = SparseCompletionNet(CHANNELS[channels], options["use_checkpoint"]).train(mode == "train")
        self.net.heads = nn.ModuleList(
            Perfect(head, case, 2**level) for head, level in zip(self.net.heads, reversed(range(6)), strict=True)
        )
        self.loss = SparseCompletionLoss()

    def __call__(self) -> float:
        """One step; the number of candidates at full resolution, or the loss."""
        x = self._tensor(self.case.defective)
        if self.mode == "test":
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
                return len(self.net(x))
        target = self._tensor(self.case.complete)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            loss = self.loss(self.net(x, target), target)
        loss.backward()
        return float(loss.detach())

    def _tensor(self, coordinates: Tensor) -> SparseTensor:
        ones = torch.ones(len(coordinates), 1)
        return SparseTensor(ones, coordinates, self.case.shape, batch_size=self.case.batch_size)


class MinkowskiStep:
    """The same network, weights copied, in MinkowskiEngine."""

    def __init__(self, case: Case, channels: str, mode: str, options: dict) -> None:
        from minkowski_reference import MinkowskiCompletionNet

        self.case, self.mode = case, mode
        ours = SparseCompletionNet(CHANNELS[channels])
        self.net = MinkowskiCompletionNet(ours, case.shape).train(mode == "train")
        self.cells = {2**level: case.cells(2**level) for level in range(6)}
        self.net._worth_keeping = lambda level, _wanted: self._wanted(level)

    def __call__(self) -> float:
        """One step; the number of candidates at full resolution, or the loss."""
        with torch.set_grad_enabled(self.mode == "train"):
            levels = self.net(self.case.defective, None)
        if self.mode == "test":
            return len(levels[-1])
        wanted = [self._wanted(level) for level in levels]
        terms = [
            functional.binary_cross_entropy_with_logits(signed(level.F, w)[:, 0], w.float())
            for level, w in zip(levels, wanted, strict=True)
        ]
        loss = torch.stack(terms).sum()
        loss.backward()
        return float(loss.detach())

    def _wanted(self, level: object) -> Tensor:
        stride = level.tensor_stride[0]
        keys, shape = self.cells[stride]
        place = level.C.long()
        place[:, 1:] //= stride
        inside = (place[:, 1:] < torch.tensor(shape)).all(1)
        asked = voxels.coordinates_to_keys(place, shape)
        return inside & (keys[torch.searchsorted(keys, asked).clamp_(max=len(keys) - 1)] == asked)


class DenseCompletionNet(nn.Module):
    """The same layers on the full grid: convolutions, batch norm, ReLU, sums with the encoder, a head per level."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = _dense_block(nn.Conv3d(1, channels[0], 3, padding=1, bias=False))
        self.down = nn.ModuleList(
            nn.Sequential(
                _dense_block(nn.Conv3d(channels[i], channels[i + 1], 2, 2, bias=False)),
                _dense_block(nn.Conv3d(channels[i + 1], channels[i + 1], 3, padding=1, bias=False)),
            )
            for i in range(6)
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                _dense_block(nn.ConvTranspose3d(channels[i + 1], channels[i], 2, 2, bias=False)),
                _dense_block(nn.Conv3d(channels[i], channels[i], 3, padding=1, bias=False)),
            )
            for i in reversed(range(6))
        )
        self.heads = nn.ModuleList(nn.Conv3d(channels[i], 1, 1) for i in reversed(range(6)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 1, H, W, D), extents divisible by 64 -> six volumes of logits, coarsest first."""
        features = [self.stem(x)]
        for block in self.down:
            features.append(block(features[-1]))
        x, levels = features.pop(), []
        for block, head in zip(self.up, self.heads, strict=True):
            x = block(x) + features.pop()
            levels = [*levels, head(x)] if self.training else [head(x)]
        return levels


def _dense_block(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm3d(convolution.out_channels), nn.ReLU(inplace=True))


class DenseStep:
    """The dense twin on the zero-filled volume, padded to multiples of 64."""

    def __init__(self, case: Case, channels: str, mode: str, options: dict) -> None:
        self.mode = mode
        self.net = DenseCompletionNet(CHANNELS[channels]).train(mode == "train")
        shape = [-(-n // 64) * 64 for n in case.shape]
        self.volumes = []
        for coordinates in (case.defective, case.complete):
            volume = torch.zeros(case.batch_size, 1, *shape)
            batch, i, j, k = coordinates.unbind(1)
            volume[batch, 0, i, j, k] = 1
            self.volumes.append(volume)

    def __call__(self) -> float:
        """One step; the voxels of the output, or the loss."""
        defective, complete = self.volumes
        with torch.set_grad_enabled(self.mode == "train"):
            levels = self.net(defective)
        if self.mode == "test":
            return levels[-1].numel()
        loss = sum(
            functional.binary_cross_entropy_with_logits(level, functional.max_pool3d(complete, 2 ** (5 - number)))
            for number, level in enumerate(levels)
        )
        loss.backward()
        return float(loss.detach())


STEPS = {"native": SparseStep, "minkowski": MinkowskiStep, "dense": DenseStep}

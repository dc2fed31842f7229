"""What the octree queries: a network that labels points of one volume, or a function, and checks of its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monai_memeff.checks import check_logits
from monai_memeff.errors import InputError
from monai_memeff.geometry import index_to_unit, sample_at
from monai_memeff.memory import measure_peak
from monai_memeff.memory.budget import fitting_part, lacking, measured_part, ran_out, refusing_when_full

_WAY_OUT = "free some, take a coarser grid, or another device"


class PointEvaluator:
    """The answers of one network about one volume.

    Args:
        network: has ``encode(volume) -> latent``, ``query(latent, points, volume) -> (B, N, K)`` and, if it likes,
            ``coarse_logits(latent) -> (B, K, h, w, d)`` or None; bare or inside DistributedDataParallel. Or a function
            points (B, N, 3) -> (B, N, K) that is not a module.
        volume: (1, C, H, W, D) on any device; answers come back to that device.
        memory_budget: bytes that one call of the network may take on its device; None for any number.

    Attributes:
        channels: K, from the first answer on; 0 before.
        coarse: the network's coarse prediction (1, K, h, w, d) of the whole volume, or None.

    Raises:
        TypeError: the network answers no points.
        ValueError: the coarse prediction has another shape, or is NaN.
    """

    def __init__(self, network: Any, volume: Tensor, memory_budget: int | None = None) -> None:
        network = getattr(network, "module", network)
        self._plain = not (hasattr(network, "encode") and hasattr(network, "query"))
        if self._plain and (isinstance(network, nn.Module) or not callable(network)):
            raise TypeError(
                f"OctreeInferer needs a network with the methods encode and query, got {type(network).__name__}; "
                "use OccupancyNet, or MONAI's SlidingWindowInferer for dense networks."
            )
        self._network, self._shape, self._home = network, tuple(volume.shape[2:]), volume.device
        weight = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        self._device = volume.device if weight is None else weight.device
        self.channels = 0
        self._budget, self._limit = memory_budget, 0
        self.coarse: Tensor | None = None
        if not self._plain:
            with refusing_when_full(f"a look at the whole volume of {self._shape}", self._device, _WAY_OUT):
                self._volume = volume.to(self._device)
                self._latent = self._encode(memory_budget)
                if hasattr(network, "coarse_logits"):
                    self.coarse = self._checked_coarse(network.coarse_logits(self._latent))

    def logits(self, voxels: Tensor) -> Tensor:
        """The network's logits (N, K) at (N, 3) voxels, in as many passes as memory needs.

        Raises:
            ValueError: they have another shape, or are NaN.
            InputError: one point at a time is too much for the device, or for the budget.
        """
        self._limit = self._limit or self._first_limit(voxels)
        if len(voxels) > self._limit:
            return torch.cat([self.logits(part) for part in voxels.split(self._limit)])
        try:
            return self._answer(voxels)
        except RuntimeError as error:
            if not ran_out(error, self._device):
                raise
            if len(voxels) == 1:
                raise InputError(f"one point beside the volume {lacking(error, self._device)}: {_WAY_OUT}") from error
        self._limit = -(-len(voxels) // 2)
        return self.logits(voxels)

    def _first_limit(self, voxels: Tensor) -> int:
        """Points in one call, from the first call on."""
        if self._budget is None or not len(voxels):
            return max(1, len(voxels))
        examples = voxels.new_zeros(1, 3)
        peak = measured_part(lambda n: self._answer(examples.expand(n, 3)), self._device)
        return fitting_part(len(voxels), peak, self._budget, "points", first=64)

    def _encode(self, budget: int | None) -> Any:
        """The network's view of the whole volume, which cannot be had in parts."""
        if budget is None:
            return self._network.encode(self._volume)
        with measure_peak(self._device) as meter:
            latent = self._network.encode(self._volume)
        if meter.peak_bytes > budget:
            raise InputError(
                f"memory_budget is {budget} bytes, and the network takes {meter.peak_bytes} to look at the whole "
                "volume: raise it to that, or take a coarser grid"
            )
        return latent

    def _answer(self, voxels: Tensor) -> Tensor:
        points = voxels.to(self._device, torch.float32)[None]
        answer = self._network(points) if self._plain else self._network.query(self._latent, points, self._volume)
        if answer.dim() != 3 or answer.shape[:2] != points.shape[:2] or not self._fits(answer.shape[2]):
            channels = self.channels or "K"
            raise ValueError(f"query must give logits (1, {len(voxels)}, {channels}), got {tuple(answer.shape)}.")
        return check_logits(answer[0], "query").to(self._home)

    def coarse_logits(self, voxels: Tensor) -> Tensor:
        """The coarse prediction (N, K) at (N, 3) voxels, interpolated trilinearly."""
        assert self.coarse is not None
        unit = index_to_unit(voxels.to(self._device, torch.float32), self._shape)
        return sample_at(self.coarse, unit[None])[0].T.to(self._home)

    def _checked_coarse(self, coarse: Tensor | None) -> Tensor | None:
        if coarse is None:
            return None
        if coarse.dim() != 5 or coarse.shape[0] != 1 or not self._fits(coarse.shape[1]):
            raise ValueError(f"coarse_logits must be (1, K, h, w, d), got {tuple(coarse.shape)}.")
        return check_logits(coarse.float(), "coarse_logits")

    def _fits(self, channels: int) -> bool:
        """Whether K is at least 1 and what it was before."""
        self.channels = self.channels or channels
        return 1 <= channels == self.channels


def labels_of(logits: Tensor) -> Tensor:
    """Labels (N,) of logits (N, K): the largest of several, or 1 where a single one is positive; uint8 or int16."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(torch.uint8)
    return logits.argmax(1).to(label_dtype(logits.shape[1]))


def label_dtype(classes: int) -> torch.dtype:
    """The smallest dtype that holds labels 0 ... classes - 1."""
    return torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32

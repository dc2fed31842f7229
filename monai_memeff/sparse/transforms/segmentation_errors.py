"""RandSegmentationErrors: errors of a coarse segmentation, made up, for training what comes after it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import TransformBackends
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_mask
from monai_memeff.sparse.transforms.volumes import checked_volume

__all__ = ["RandSegmentationErrors", "RandSegmentationErrorsD", "RandSegmentationErrorsDict", "RandSegmentationErrorsd"]


class RandSegmentationErrors(RandomizableTransform):
    """Flip random cells at the boundary of a coarse mask, and add small random holes and islands.

    A network that segments on a coarse grid errs; one that was trained on perfect coarse masks takes every error for
    the truth. A cell is at the boundary where one of its six neighbors differs; the volume's border is none. Cells
    inside, at the boundary, are lost with another probability than cells outside are added, for coarse masks of the
    mode "any" have cells that are hardly filled, and a network leaves those out more often than it adds others.

    Args:
        false_negatives: Largest fraction of the boundary cells inside that become 0, in [0, 1]; every mask draws its
            fraction evenly between 0 and this.
        false_positives: Largest fraction of the boundary cells outside that become 1.
        spots: largest number of holes, and of islands; every mask draws both evenly from 0 to this. A hole lies around
            an occupied cell, an island around any cell.
        radius: largest radius of a hole or an island in cells, at least 0: with 0 it is one cell.
        prob: probability that it happens.

    Raises:
        ValueError: a value is out of range.

    Examples:
        >>> errors = RandSegmentationErrors(prob=1.0).set_random_state(seed=0)
        >>> mask = torch.ones(1, 8, 8, 8).triu()
        >>> bool((errors(mask) != mask).any())
        True
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self,
        false_negatives: float = 0.4,
        false_positives: float = 0.1,
        spots: int = 2,
        radius: float = 1.5,
        prob: float = 0.5,
    ) -> None:
        super().__init__(prob)
        if radius < 0:
            raise ValueError(f"radius must be at least 0 cells, got {radius}.")
        self.false_negatives, self.false_positives, self.spots, self.radius = (
            false_negatives,
            false_positives,
            spots,
            radius,
        )
        self._flipped = np.zeros(0, dtype=bool)
        self._places: list[tuple[float, float, bool]] = []

    def randomize(self, data: np.ndarray) -> None:
        """Draw what changes.

        Args:
            data: (N,) boolean, which of the boundary cells are inside.
        """
        super().randomize(None)
        self._flipped, self._places = np.zeros(len(data), dtype=bool), []
        if not self._do_transform:
            return
        false_negatives, false_positives = (
            self.R.uniform(0, self.false_negatives),
            self.R.uniform(0, self.false_positives),
        )
        self._flipped = self.R.random_sample(len(data)) < np.where(data, false_negatives, false_positives)
        holes, islands = self.R.randint(0, self.spots + 1, size=2)
        for number in range(holes + islands):
            self._places.append((self.R.random_sample(), self.R.uniform(0, self.radius), bool(number >= holes)))

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> Tensor:
        """Make errors.

        Args:
            img: (C, h, w, d), the coarse mask, non-zero where there is something; it is left as it is.
            randomize: whether to draw, or make the same errors in the same mask again.

        Returns:
            (C, h, w, d) of 0 and 1, uint8, with the metadata of a MetaTensor. A mask of which nothing would be left
            comes back without errors, an empty one empty.

        Raises:
            ValueError: ``img`` is not (C, h, w, d), or holds NaN, infinity or negative numbers.
            TypeError: ``img`` is not a tensor or an array.
        """
        volume = checked_volume(img, "RandSegmentationErrors")
        check_mask(volume, "RandSegmentationErrors")
        mask = volume.as_subclass(Tensor) != 0
        edge = _boundary(mask).flatten().nonzero()[:, 0]
        if randomize:
            self.randomize(mask.flatten()[edge].cpu().numpy())
        result = self._spotted(mask)
        result.view(-1)[edge[torch.from_numpy(self._flipped).to(edge.device)]] ^= True
        result = (result if bool(result.any()) and bool(mask.any()) else mask).to(torch.uint8)
        return MetaTensor(result).copy_meta_from(volume) if isinstance(volume, MetaTensor) else result

    def _spotted(self, mask: Tensor) -> Tensor:
        """A copy with the holes and islands."""
        result, occupied = mask.clone(), mask.flatten().nonzero()[:, 0] if self._places else None
        for where, radius, island in self._places:
            if occupied is None or not len(occupied):
                break
            among = mask.numel() if island else len(occupied)
            cell = min(int(where * among), among - 1)
            _fill_ball(result, cell if island else int(occupied[cell]), radius, island)
        return result


class RandSegmentationErrorsd(RandomizableTransform, MapTransform):
    """Dictionary version of :class:`RandSegmentationErrors`, which has an example; every mask gets a draw of its own.

    Args:
        keys: coarse masks.
        false_negatives: see :class:`RandSegmentationErrors`.
        false_positives: see :class:`RandSegmentationErrors`.
        spots: see :class:`RandSegmentationErrors`.
        radius: see :class:`RandSegmentationErrors`.
        prob: see :class:`RandSegmentationErrors`.
        allow_missing_keys: pass over masks that are not there.
    """

    backend = RandSegmentationErrors.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        false_negatives: float = 0.4,
        false_positives: float = 0.1,
        spots: int = 2,
        radius: float = 1.5,
        prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.noise = RandSegmentationErrors(false_negatives, false_positives, spots, radius, prob)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandSegmentationErrorsd:
        """Set the random state of this transform and of the one that draws."""
        super().set_random_state(seed, state)
        self.noise.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make errors in the masks of a copy of ``data``."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.noise(result[key])
        return result


RandSegmentationErrorsD = RandSegmentationErrorsDict = RandSegmentationErrorsd


def _boundary(mask: Tensor) -> Tensor:
    """(C, h, w, d) boolean: cells with a neighbor across a face that differs."""
    result = torch.zeros_like(mask)
    for axis in (1, 2, 3):
        steps = mask.shape[axis] - 1
        changes = mask.diff(dim=axis)
        result.narrow(axis, 0, steps).logical_or_(changes)
        result.narrow(axis, 1, steps).logical_or_(changes)
    return result


def _fill_ball(mask: Tensor, center: int, radius: float, value: bool) -> None:
    """Set the cells within ``radius`` of a flat index, in its channel."""
    channel, *at = np.unravel_index(center, mask.shape)
    reach = int(radius)
    part = [slice(max(int(c) - reach, 0), int(c) + reach + 1) for c in at]
    steps = [torch.arange(n, device=mask.device)[s] - int(c) for n, s, c in zip(mask.shape[1:], part, at, strict=True)]
    within = steps[0][:, None, None] ** 2 + steps[1][:, None] ** 2 + steps[2] ** 2 <= radius**2
    mask[int(channel)][tuple(part)][within] = value

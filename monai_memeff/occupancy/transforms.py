"""Transforms that draw training points of a labeled volume, always the same number, so that samples collate."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Randomizable, Transform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.occupancy.sampling import PUBLISHED_BAND, checked_band, checked_fractions, sample_points

__all__ = ["RandOccupancyPoints", "RandOccupancyPointsD", "RandOccupancyPointsDict", "RandOccupancyPointsd"]


class RandOccupancyPoints(Randomizable, Transform):
    """Draw points of a label volume.

    Reich et al., BMVC 2021 (arXiv 2110.10640), section 4: 2^14 points per volume, for BraTS uniform, for LiTS half of
    them near the liver's border. Points are voxel indices of the volume as it is now: geometry does not follow them, so
    place the transform last.

    Args:
        num_samples: Number of points N.
        sampling: ``"uniform"``; ``"border"``: half of the points from voxels near a change of the label (a gradient
            dilated by ``band_width``^3), all of these if there are fewer, and the others uniform; ``"balanced"``: as
            many of every label that is there; or fractions, for example ``{"uniform": 0.5, "balanced": 0.5}``.
        band_width: Odd width of the dilation in voxels.
        ignore_index: Label of voxels without annotation, which are not drawn. A volume of nothing else gives points
            with this label, which :class:`~monai_memeff.occupancy.OccupancyLoss` leaves out.

    Raises:
        ValueError: num_samples below 1, an even band_width, or a wrong ``sampling``.

    Examples:
        >>> label = torch.zeros(1, 16, 16, 16).index_fill(1, torch.arange(8), 1)
        >>> points, values = RandOccupancyPoints(num_samples=64, sampling="balanced").set_random_state(0)(label)
        >>> points.shape, int(values.sum())
        (torch.Size([64, 3]), 32)
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self,
        num_samples: int = 2**14,
        sampling: str | Mapping[str, float] = "border",
        band_width: int = PUBLISHED_BAND,
        ignore_index: int | None = None,
    ) -> None:
        self.num_samples, self.band_width, self.ignore_index = num_samples, checked_band(band_width), ignore_index
        self.sampling = checked_fractions(sampling)

    def __call__(self, label: NdarrayOrTensor) -> tuple[Tensor, Tensor]:
        """Draw.

        Args:
            label: (1, H, W, D) whole numbers.

        Returns:
            Points (N, 3) float32 [i, j, k] in voxel indices, and labels (N,) int64, without metadata.

        Raises:
            ValueError: the label has another shape, no voxels, NaN or fractions.
        """
        volume = convert_to_tensor(label, track_meta=False)
        return sample_points(volume, self.num_samples, self.sampling, self._draw, self.band_width, self.ignore_index)

    def _draw(self, limit: int, count: int) -> Tensor:
        return torch.from_numpy(self.R.randint(limit, size=count, dtype=np.int64))


class RandOccupancyPointsd(Randomizable, MapTransform):
    """Dictionary version of :class:`RandOccupancyPoints`: writes new keys and leaves the label as it is.

    Args:
        keys: the label (1, H, W, D); one key.
        points_key: where points (N, 3) go.
        occupancy_key: where the points' labels (N,) go.
        num_samples: see :class:`RandOccupancyPoints`.
        sampling: see :class:`RandOccupancyPoints`.
        band_width: see :class:`RandOccupancyPoints`.
        ignore_index: see :class:`RandOccupancyPoints`.
        allow_missing_keys: pass over samples without a label.

    Raises:
        ValueError: more than one key, or a new key that starts with the label's key and an underscore, which MONAI's
            ``Spacingd`` takes for metadata.

    Examples:
        >>> draw = RandOccupancyPointsd("label", num_samples=64).set_random_state(0)
        >>> draw({"label": torch.ones(1, 16, 16, 16)})["points"].shape
        torch.Size([64, 3])
    """

    backend = RandOccupancyPoints.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        points_key: str = "points",
        occupancy_key: str = "occupancy",
        num_samples: int = 2**14,
        sampling: str | Mapping[str, float] = "border",
        band_width: int = PUBLISHED_BAND,
        ignore_index: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(f"keys must name one label, got {len(self.keys)}: use one transform per label.")
        clash = [key for key in (points_key, occupancy_key) if key.startswith(f"{self.keys[0]}_")]
        if clash:
            raise ValueError(f"{clash[0]!r} starts with {self.keys[0]!r} and '_', which MONAI takes for metadata.")
        self.points_key, self.occupancy_key = points_key, occupancy_key
        self.draw_points = RandOccupancyPoints(num_samples, sampling, band_width, ignore_index)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandOccupancyPointsd:
        """Set the random state of this transform and of what it draws with."""
        super().set_random_state(seed, state)
        self.draw_points.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add points and their labels to a copy of ``data``."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[self.points_key], result[self.occupancy_key] = self.draw_points(result[key])
        return result


RandOccupancyPointsD = RandOccupancyPointsDict = RandOccupancyPointsd

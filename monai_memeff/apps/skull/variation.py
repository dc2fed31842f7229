"""RandSkullVariation: another head out of a given one, for training completion on few complete skulls."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import TransformBackends, convert_to_dst_type
from torch import Tensor

from monai_memeff.arguments import check_number, numbers_checked
from monai_memeff.sparse.transforms.masks import as_volume, foreground_mask

__all__ = ["RandSkullVariation", "RandSkullVariationD", "RandSkullVariationDict", "RandSkullVariationd"]

CONTROL_POINTS = 5  # per axis: bends as broad as a quarter of the volume
LEVELS = (0.25, 0.45)  # interpolated bone above such a level is bone; below one half, so that thin bone stays closed


class RandSkullVariation(RandomizableTransform):
    """Turn a complete skull into another plausible one.

    The skull is rotated, scaled along each axis, sheared and bent by a smooth random field in one interpolation, and
    cut at a random level, which makes it thicker or thinner by up to a quarter of a voxel; its lower end may be outside
    the field of view. Such variations of few training heads are what the strongest published completion learns from
    (Wodzinski et al. 2024, arXiv 2406.06372).

    Args:
        rotation: largest angle about each axis, in radians.
        scale: largest change of the length of each axis, as a fraction.
        shear: largest shear between two axes.
        bend: largest displacement of the random field, as a fraction of the volume's edge.
        cut: probability that the lower end is cut off, by up to a third of the volume.
        prob: probability of any change.

    Raises:
        ValueError: when a range is negative, or a scale not below 1.

    Examples:
        >>> skull = SkullShell()(torch.ones(1, 32, 32, 32))
        >>> another = RandSkullVariation().set_random_state(0)(skull)
        >>> another.shape, another.unique()
        (torch.Size([1, 32, 32, 32]), tensor([0., 1.]))
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self,
        rotation: float = 0.15,
        scale: float = 0.15,
        shear: float = 0.05,
        bend: float = 0.03,
        cut: float = 0.3,
        prob: float = 1.0,
    ) -> None:
        super().__init__(prob)
        for name, value in (("rotation", rotation), ("shear", shear), ("bend", bend)):
            check_number(name, value, least=0)
        if not (0 <= scale < 1 and 0 <= cut <= 1):
            raise ValueError(f"scale must be at least 0 and below 1, and cut a probability, got {scale} and {cut}.")
        self.rotation, self.scale, self.shear, self.bend, self.cut = rotation, scale, shear, bend, cut
        self._matrix = np.eye(3)
        self._field = np.zeros((3, *[CONTROL_POINTS] * 3))
        self._level, self._rows_cut = 0.5, 0.0

    def randomize(self, data: Any | None = None) -> None:
        """Draw a matrix, a field of displacements, a level and how much is cut off."""
        super().randomize(None)
        if not self._do_transform:
            return
        angles = self.R.uniform(-self.rotation, self.rotation, 3)
        matrix = np.diag(1 + self.R.uniform(-self.scale, self.scale, 3)) + np.triu(
            self.R.uniform(-self.shear, self.shear, (3, 3)), 1
        )
        for axis, angle in enumerate(angles):
            i, j = (n for n in range(3) if n != axis)
            turn = np.eye(3)
            turn[i, i] = turn[j, j] = np.cos(angle)
            turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
            matrix = matrix @ turn
        self._matrix = matrix
        self._field = self.R.uniform(-1, 1, (3, *[CONTROL_POINTS] * 3)) * 2 * self.bend
        self._level = float(self.R.uniform(*LEVELS))
        self._rows_cut = float(self.R.uniform(0, 1 / 3)) if self.R.random_sample() < self.cut else 0.0

    def __call__(self, img: Tensor, randomize: bool = True) -> Tensor:
        """Vary a skull.

        Args:
            img: complete skull (1, H, W, D), bone where it is not zero, its last axis upwards; it is left as it is.
            randomize: whether to draw anew, or repeat the last variation.

        Returns:
            The other skull, 0 and 1, with dtype, device and metadata of ``img``.

        Raises:
            ValueError: when ``img`` is not (1, H, W, D), or has values that are NaN, infinite or negative.
        """
        img = as_volume(img)
        if len(img) != 1:
            raise ValueError(f"a skull must be (1, H, W, D), got {tuple(img.shape)}; give one mask of a head.")
        mask = foreground_mask(img)
        if randomize:
            self.randomize()
        if not self._do_transform:
            return img
        bone = F.grid_sample(mask[None].float(), self._grid(mask), mode="bilinear", align_corners=False)[0]
        varied = bone > self._level
        varied[..., : int(self._rows_cut * varied.shape[-1])] = False
        return convert_to_dst_type(varied, img)[0]

    def _grid(self, volume: Tensor) -> Tensor:
        """Where every voxel comes from, (1, H, W, D, 3) in grid_sample's coordinates (last axis first)."""
        matrix = torch.as_tensor(self._matrix, dtype=torch.float32, device=volume.device)
        theta = torch.cat([matrix, matrix.new_zeros(3, 1)], dim=1)[None]
        grid = F.affine_grid(theta, [1, 1, *volume.shape[1:]], align_corners=False)
        field = torch.as_tensor(self._field, dtype=torch.float32, device=volume.device)[None]
        bent = F.interpolate(field, size=volume.shape[1:], mode="trilinear", align_corners=True)
        return grid + bent.movedim(1, -1)


class RandSkullVariationd(RandomizableTransform, MapTransform):
    """Dictionary version of :class:`RandSkullVariation`.

    Args:
        keys: the key of the complete skull.
        rotation: see :class:`RandSkullVariation`.
        scale: see :class:`RandSkullVariation`.
        shear: see :class:`RandSkullVariation`.
        bend: see :class:`RandSkullVariation`.
        cut: see :class:`RandSkullVariation`.
        prob: see :class:`RandSkullVariation`.
        allow_missing_keys: whether a dictionary without the key passes through.

    Raises:
        ValueError: when more than one key is given, or as :class:`RandSkullVariation`.

    Examples:
        >>> vary = RandSkullVariationd("skull").set_random_state(0)
        >>> vary({"skull": torch.ones(1, 16, 16, 16)})["skull"].unique()
        tensor([0., 1.])
    """

    backend = RandSkullVariation.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        rotation: float = 0.15,
        scale: float = 0.15,
        shear: float = 0.05,
        bend: float = 0.03,
        cut: float = 0.3,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        if len(self.keys) != 1:
            raise ValueError(f"keys must name one complete skull, got {len(self.keys)}: each would be another head")
        self.variation = RandSkullVariation(rotation, scale, shear, bend, cut, prob)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandSkullVariationd:
        """Set the random state of this transform and of the variation it draws."""
        super().set_random_state(seed, state)
        self.variation.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the skull by another one.

        Args:
            data: holds a complete binary skull (1, H, W, D) under the key.

        Raises:
            KeyError: when the key is missing and must not be.
            ValueError: see :class:`RandSkullVariation`.
        """
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = self.variation(out[key])
        return out


RandSkullVariationD = RandSkullVariationDict = RandSkullVariationd

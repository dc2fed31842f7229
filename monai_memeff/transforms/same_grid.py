"""CheckSameGridd: volumes of one case that do not lie over each other are refused."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import TransformBackends
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.errors import InputError
from monai_memeff.geometry import mm_to_index, ras_affine
from monai_memeff.geometry.grid import index_to_mm
from monai_memeff.transforms.each_key import name_of

__all__ = ["CheckSameGridD", "CheckSameGridDict", "CheckSameGridd"]


class CheckSameGridd(MapTransform):
    """Pass volumes that lie voxel over voxel, such as an image and its label, and refuse others.

    Later transforms bring every volume to one spacing or size by itself: those of another place, size or orientation
    would pass for a pair.

    Args:
        keys: Volumes (C, H, W, D) that share a grid.
        tolerance: How far a corner of one may lie from that of the other, in voxels.
        allow_missing_keys: Whether a dictionary without a key passes.

    Examples:
        >>> CheckSameGridd(["image", "label"])({"image": torch.ones(1, 4, 4, 4), "label": torch.ones(1, 4, 4, 5)})
        Traceback (most recent call last):
        monai_memeff.errors.InputError: the volume has (4, 4, 5) voxels, and ...
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, keys: KeysCollection, tolerance: float = 0.1, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.tolerance = tolerance

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data``.

        Raises:
            InputError: the extents differ, or a corner lies elsewhere in millimeters.
        """
        volumes = [data[key] for key in self.key_iterator(dict(data))]
        for other in volumes[1:]:
            self._check(volumes[0], other)
        return dict(data)

    def _check(self, first: Tensor, other: Tensor) -> None:
        extents, found = (tuple(volume.shape[1:]) for volume in (first, other))
        if extents != found:
            raise InputError(
                f"{name_of(other)} has {found} voxels, and {name_of(first)} has {extents}: they must share a grid; "
                "pair other files, or resample one"
            )
        if not (isinstance(first, MetaTensor) and isinstance(other, MetaTensor)):
            return
        corners = torch.tensor(list(itertools.product(*((0, extent - 1) for extent in extents))), dtype=torch.float64)
        moved = mm_to_index(index_to_mm(corners, ras_affine(other)), ras_affine(first)) - corners
        most = float(moved.abs().max())
        if not most <= self.tolerance:
            raise InputError(
                f"{name_of(other)} lies up to {most:.3g} voxels beside {name_of(first)}: they must share a grid; pair "
                "other files, or resample one"
            )


CheckSameGridD = CheckSameGridDict = CheckSameGridd

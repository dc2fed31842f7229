"""Transforms: each rank's box of a volume."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, SpatialCrop, Transform
from monai.utils import TransformBackends, convert_to_tensor

from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh


class PartitionCrop(Transform):
    """Keep this rank's box of a volume (C, spatial...); the affine of a MetaTensor moves with it.

    A memory-mapped array (`numpy.load(..., mmap_mode="r")`, nibabel's `dataobj` of an uncompressed file with a channel
    axis) is read only inside the box.

    Args:
        mesh: where the parts live.

    Examples:
        >>> mesh = init_mesh(spatial=(1,))  # (2,) under torchrun: 4 or 5 of the 9 rows
        >>> PartitionCrop(mesh)(torch.rand(1, 9, 8, 8)).shape
        torch.Size([1, 9, 8, 8])
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, mesh: HaloMesh) -> None:
        self.mesh = mesh

    def __call__(self, img: Any) -> torch.Tensor:
        """Crop one volume.

        Raises:
            ValueError: if the volume lacks a split axis, on every rank.
        """
        spatial = self.mesh.slices(img.shape[1:])
        if isinstance(img, torch.Tensor):
            return SpatialCrop(roi_slices=list(spatial))(img)
        box = (slice(None), *spatial)
        return convert_to_tensor(np.array(img[box]))


class PartitionCropd(MapTransform):
    """Dictionary version of `PartitionCrop`.

    Args:
        keys: keys of volumes (C, spatial...).
        mesh: where the parts live.
        allow_missing_keys: do not raise if a key is missing.

    Examples:
        >>> crop = PartitionCropd(("image", "label"), init_mesh(spatial=(1,)))  # (2,) under torchrun
        >>> crop(dict.fromkeys(("image", "label"), torch.rand(1, 9, 8, 8)))["label"].shape
        torch.Size([1, 9, 8, 8])
    """

    backend = PartitionCrop.backend

    def __init__(self, keys: KeysCollection, mesh: HaloMesh, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.crop = PartitionCrop(mesh)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop the volumes of all keys."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.crop(d[key])
        return d


PartitionCropD = PartitionCropDict = PartitionCropd

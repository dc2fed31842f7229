"""The upper skull without its face, as the paper of 2021 crops it.

Kroviakov, Li and Egger 2021 (AutoImplant challenge, third task). Masks are binary volumes (C, H, W, D), any voxel that
is not zero being bone; z is the last axis and grows upwards, as in MONAI's RAS.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Crop, InvertibleTransform, MapTransform
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.geometry import grid, ras_affine
from monai_memeff.sparse.transforms.masks import as_volume, foreground_mask

FRONTS = ("high", "low")


class UpperSkullCrop(Crop):
    """Crop to the upper skull and empty the face.

    What lies above the highest bone is cropped away, ``keep`` slices plus ``fraction`` of all slices below it are kept,
    and ``face`` voxels from the foremost bone backwards are emptied, as the paper does for its defects of the vault.
    The affine follows, and the inverse pads with zeros (the face stays empty).

    A defect at the vertex lowers the highest bone: keep some slices ``top_margin``, or crop by the complete skull.

    Args:
        keep: slices to keep below the top, beside ``fraction``.
        fraction: fraction of the volume's slices to keep in addition, rounded down.
        face: voxels to empty along y, counted from the foremost bone; 0 keeps the face.
        face_mm: Depth of the face in millimeters of the affine, instead of ``face``; 95 voxels of 0.45 mm
            are about 43 mm.
        top_margin: slices to keep above the top.
        front: which end of y the face is at: ``"high"`` (RAS) or ``"low"`` (LPS, and the challenge's files as stored).
            None reads the affine of a MetaTensor, and takes RAS without one.

    Raises:
        ValueError: a number is negative or the end unknown.

    Examples:
        >>> skull = torch.ones(1, 32, 32, 32)
        >>> upper = UpperSkullCrop(keep=10, fraction=0.1, face=8)(skull)
        >>> upper.shape, int(upper[0, 0, :, 0].sum())
        (torch.Size([1, 32, 32, 13]), 24)
    """

    backend = Crop.backend

    @numbers_checked
    def __init__(
        self,
        keep: int = 126,
        fraction: float = 0.05,
        face: int = 95,
        face_mm: float | None = None,
        top_margin: int = 0,
        front: str | None = None,
    ) -> None:
        super().__init__(lazy=False)
        if front is not None and front not in FRONTS:
            raise ValueError(f"front must be one of {', '.join(FRONTS)} or None, got {front!r}.")
        self.keep, self.fraction, self.face, self.face_mm = keep, fraction, face, face_mm
        self.top_margin, self.front = top_margin, front

    @property
    def requires_current_data(self) -> bool:
        """The crop depends on the voxels: MONAI's lazy pipelines evaluate what is pending first."""
        return True

    def __call__(self, img: Tensor, source: Tensor | None = None, lazy: bool | None = None) -> Tensor:
        """Crop.

        Args:
            img: (C, H, W, D); it is left as it is.
            source: (C, H, W, D) on the same grid, the skull that says where top and face are; default ``img``.
            lazy: without effect, the crop is done at once.

        Returns:
            (C, H, W, d).

        Raises:
            ValueError: shapes do not fit, the skull is empty, or the affine says that y does not run between front and
                back or z not upwards.
        """
        img, source = as_volume(img), as_volume(img if source is None else source)
        if img.shape[1:] != source.shape[1:]:
            raise ValueError(f"volume and source must share a grid, got {tuple(img.shape)} and {tuple(source.shape)}.")
        bone = foreground_mask(source).any(0)
        if not bool(bone.any()):
            raise ValueError("the skull is empty, so it has no top; check the threshold that made it.")
        face = self._face(source, bone)
        heights = bone.any(0).any(0).nonzero()[:, 0]
        top, slices = int(heights[-1]) + 1, bone.shape[2]
        bottom = max(0, top - self.keep - int(slices * self.fraction))
        cropped = super().__call__(img, (slice(None), slice(None), slice(bottom, min(top + self.top_margin, slices))))
        return cropped.masked_fill(face[None, None, :, None], 0)

    def _face(self, source: Tensor, bone: Tensor) -> Tensor:
        """(W,) boolean, the voxels along y to empty."""
        high = _faces_high(source) if self.front is None else self.front == "high"
        step = grid.spacing(source.affine)[1] if isinstance(source, MetaTensor) else 1.0
        depth = self.face if self.face_mm is None else round(self.face_mm / step)
        occupied = bone.any(2).any(0).nonzero()[:, 0]
        y = torch.arange(bone.shape[1], device=bone.device)
        return y > int(occupied[-1]) - depth if high else y < int(occupied[0]) + depth


class UpperSkullCropd(MapTransform, InvertibleTransform):
    """Dictionary version of :class:`UpperSkullCrop`: one skull says where to crop, all volumes follow.

    Args:
        keys: volumes on one grid.
        source_key: the skull that says where top and face are; default the first of ``keys``. The authors cropped
            every volume by itself, which shifts a pair apart where the defect is at the top.
        keep: see :class:`UpperSkullCrop`.
        fraction: see :class:`UpperSkullCrop`.
        face: see :class:`UpperSkullCrop`.
        face_mm: see :class:`UpperSkullCrop`.
        top_margin: see :class:`UpperSkullCrop`.
        front: see :class:`UpperSkullCrop`.
        allow_missing_keys: whether a dictionary without a key passes through.

    Examples:
        >>> crop = UpperSkullCropd(("skull", "implant"), keep=10, fraction=0, face=0)
        >>> case = crop({"skull": torch.ones(1, 16, 16, 16), "implant": torch.zeros(1, 16, 16, 16)})
        >>> case["implant"].shape, crop.inverse(case)["skull"].shape
        (torch.Size([1, 16, 16, 10]), torch.Size([1, 16, 16, 16]))
    """

    backend = UpperSkullCrop.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        source_key: str | None = None,
        keep: int = 126,
        fraction: float = 0.05,
        face: int = 95,
        face_mm: float | None = None,
        top_margin: int = 0,
        front: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source_key = self.keys[0] if source_key is None else source_key
        self.crop = UpperSkullCrop(keep, fraction, face, face_mm, top_margin, front)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop the volumes in a copy of ``data``."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.crop(result[key], data[self.source_key])
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Pad the volumes to their grid before the crop."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.crop.inverse(result[key])
        return result


UpperSkullCropD = UpperSkullCropDict = UpperSkullCropd


def _faces_high(source: Tensor) -> bool:
    """Whether y grows to the front, by the affine."""
    if not isinstance(source, MetaTensor):
        return True
    cosines = ras_affine(source)[:3, :3].cpu() / torch.tensor(grid.spacing(source.affine))
    nearest = cosines.abs().argmax(0).tolist()
    if nearest[1:] != [1, 2] or cosines[2, 2] < 0:
        raise ValueError(
            "the affine says that y does not run between front and back, or z not upwards; bring the volume to RAS "
            "with MONAI's Orientation(axcodes='RAS'), or name the end of the face with front='high' or 'low'."
        )
    return bool(cosines[1, 1] > 0)

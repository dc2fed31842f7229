"""A fine mask made coarse, for sparse super-resolution."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, ensure_tuple_rep
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_mask
from monai_memeff.geometry.grid import resize_affine, spacing
from monai_memeff.sparse.transforms.placement import (
    reduce_axis,
    voxels_per_cell,
)
from monai_memeff.sparse.transforms.volumes import checked_volume, on_grid_of, one_of, plain, positive

COARSE_MODES = ("any", "majority", "fraction")


class DownsampleMask(Transform):
    """Coarse version of a binary mask: one voxel per cell of a grid over the same space, face to face.

    A fine voxel belongs to the cell that holds its center, so extents need not be multiples of the cell. Along an axis
    with more cells than fine voxels, a cell takes the voxel that holds the cell's center. This makes the input of
    sparse super-resolution from a fine segmentation (Li et al., Sci Rep 13:20229, 2023).

    Args:
        factor: fine voxels per cell, one number or one per axis, at least 1.
        spatial_size: cells along (H, W, D), one number or one per axis; -1 keeps an axis as it is.
        pixdim: millimeters per cell, one number or one per axis; by the spacing of a MetaTensor.
        mode: "any": a cell is 1 where any of its voxels is; "majority": where at least half of them are; "fraction":
            the fraction of them, float32.

    Give one of the first three. By ``factor`` and ``pixdim`` the grid has as many cells as make them the wanted size
    or, where the extent does not divide, a little smaller.

    Raises:
        ValueError: not one of the three is given, a value is out of range, or the mode is unknown.

    Examples:
        >>> from monai.data import MetaTensor
        >>> DownsampleMask(pixdim=2.0)(MetaTensor(torch.ones(1, 8, 8, 9))).shape  # voxels of 1 mm
        torch.Size([1, 4, 4, 5])
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self,
        factor: float | Sequence[float] | None = None,
        spatial_size: int | Sequence[int] | None = None,
        pixdim: float | Sequence[float] | None = None,
        mode: str = "any",
    ) -> None:
        if [factor, spatial_size, pixdim].count(None) != 2:
            raise ValueError(f"give one of factor, spatial_size and pixdim, got {factor}, {spatial_size}, {pixdim}.")
        self.factor = positive("factor", factor, 1)
        self.spatial_size = positive("spatial_size", spatial_size, 1, -1)
        self.pixdim = positive("pixdim", pixdim, 1e-3)
        self.mode = one_of("mode", mode, COARSE_MODES)

    def coarse_shape(self, img: Tensor) -> tuple[int, ...]:
        """Cells along each axis for a fine volume (C, H, W, D).

        Raises:
            ValueError: cells in millimeters for a volume without an affine.
        """
        extents = img.shape[1:]
        if self.spatial_size is not None:
            return tuple(n if size == -1 else int(size) for n, size in zip(extents, self.spatial_size, strict=True))
        if self.factor is not None:
            return tuple(math.ceil(n / f) for n, f in zip(extents, self.factor, strict=True))
        if not isinstance(img, MetaTensor):
            raise ValueError("pixdim needs a MetaTensor, which knows its millimeters; give factor or spatial_size.")
        lengths = [n * step for n, step in zip(extents, spacing(img.affine), strict=True)]
        return tuple(math.ceil(length / p - 1e-6) for length, p in zip(lengths, self.pixdim or (), strict=True))

    def __call__(self, img: NdarrayOrTensor) -> Tensor:
        """Coarsen.

        Args:
            img: (C, H, W, D), non-zero where there is something; the result of a MetaTensor keeps its space.

        Returns:
            (C, h, w, d), uint8 of 0 and 1, or float32 with "fraction".

        Raises:
            ValueError: the volume is not (C, H, W, D), has an empty axis, holds NaN, infinity or negative numbers, or
                cells are in millimeters and it is no MetaTensor.
            TypeError: ``img`` is not a tensor or an array.
        """
        volume = checked_volume(img, "DownsampleMask")
        extents, shape = volume.shape[1:], self.coarse_shape(volume)
        check_mask(volume, "DownsampleMask")
        result = plain(volume) != 0
        for axis, cells in enumerate(shape):
            result = reduce_axis(result, 1 + axis, cells, counted=self.mode != "any")
        if self.mode != "any":
            sizes = [
                torch.tensor(voxels_per_cell(*pair) or [1], dtype=torch.int32)
                for pair in zip(extents, shape, strict=True)
            ]
            voxels = (sizes[0][:, None, None] * sizes[1][:, None] * sizes[2]).to(result.device)
            result = result / voxels if self.mode == "fraction" else 2 * result >= voxels
        result = result if self.mode == "fraction" else result.to(torch.uint8)
        affine = resize_affine(volume.affine, extents, shape) if isinstance(volume, MetaTensor) else None
        return on_grid_of(result, volume, affine)


class DownsampleMaskd(MapTransform):
    """Dictionary version of :class:`DownsampleMask`.

    Args:
        keys: fine masks.
        coarse_key: where the coarse ones go, one name per key; None: in place of the fine ones.
        factor: see :class:`DownsampleMask`.
        spatial_size: see :class:`DownsampleMask`.
        pixdim: see :class:`DownsampleMask`.
        mode: see :class:`DownsampleMask`.
        allow_missing_keys: pass over masks that are not there.

    Examples:
        >>> transform = DownsampleMaskd("label", spatial_size=(4, 4, 4))
        >>> transform({"label": torch.ones(1, 16, 16, 16)})["label"].shape
        torch.Size([1, 4, 4, 4])
    """

    backend = DownsampleMask.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        coarse_key: str | Sequence[str] | None = None,
        factor: float | Sequence[float] | None = None,
        spatial_size: int | Sequence[int] | None = None,
        pixdim: float | Sequence[float] | None = None,
        mode: str = "any",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.coarse_keys = ensure_tuple_rep(coarse_key, len(self.keys)) if coarse_key is not None else self.keys
        self.coarsen = DownsampleMask(factor, spatial_size, pixdim, mode)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the coarse masks to a copy of ``data``."""
        result = dict(data)
        for key, coarse_key in self.key_iterator(result, self.coarse_keys):
            result[coarse_key] = self.coarsen(result[key])
        return result


DownsampleMaskD = DownsampleMaskDict = DownsampleMaskd

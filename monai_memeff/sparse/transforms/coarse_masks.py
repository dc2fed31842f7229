"""Transforms of sparse super-resolution: a fine mask made coarse, and a coarse mask brought onto a fine grid."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple_rep
from torch import Tensor

from monai_memeff.checks import check_finite, check_mask
from monai_memeff.geometry.grid import resize_affine, spacing
from monai_memeff.sparse.transforms.placement import (
    fine_to_coarse,
    interpolate_cells,
    mark_cells,
    reduce_axis,
    repeat_cells,
    voxels_per_cell,
)

__all__ = [
    "DownsampleMask",
    "DownsampleMaskD",
    "DownsampleMaskDict",
    "DownsampleMaskd",
    "ResampleToGrid",
    "ResampleToGridD",
    "ResampleToGridDict",
    "ResampleToGridd",
]

COARSE_MODES = ("any", "majority", "fraction")
PLACE_MODES = ("repeat", "center", "corner", "trilinear")
ALIGNMENTS = ("auto", "affine", "extent")


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
        ValueError: not one of the three is given, or a value is out of range.
    """

    backend = [TransformBackends.TORCH]

    def __init__(
        self,
        factor: float | Sequence[float] | None = None,
        spatial_size: int | Sequence[int] | None = None,
        pixdim: float | Sequence[float] | None = None,
        mode: str = "any",
    ) -> None:
        if [factor, spatial_size, pixdim].count(None) != 2:
            raise ValueError(f"give one of factor, spatial_size and pixdim, got {factor}, {spatial_size}, {pixdim}.")
        self.factor = _positive("factor", factor, 1)
        self.spatial_size = _positive("spatial_size", spatial_size, 1, -1)
        self.pixdim = _positive("pixdim", pixdim, 1e-3)
        self.mode = _one_of("mode", mode, COARSE_MODES)

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
            ValueError: the volume is not (C, H, W, D), or has an empty axis.
        """
        volume = _volume(img, "DownsampleMask")
        extents, shape = volume.shape[1:], self.coarse_shape(volume)
        check_mask(volume, "DownsampleMask")
        result = _plain(volume) != 0
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
        return _on_grid_of(result, volume, affine)


class ResampleToGrid(Transform):
    """Bring a coarse mask onto a fine grid: the input of a sparse super-resolution network.

    Both grids are met at cell centers. By affine, they may differ in axes, extent and tilt; a fine voxel outside of the
    coarse volume gets 0. Extents need not be multiples of each other.

    Args:
        mode: "repeat": a fine voxel takes the cell that holds its center (nearest up-sampling); "center" and "corner":
            every occupied cell marks one fine voxel, that at its center or at its first corner; "trilinear": float32
            values between the centers of cells, to compare with.
        align: "affine": by the affines of both MetaTensors; "extent": the grids cover the same space, face to face;
            "auto": by affine if both are MetaTensors, else by extent.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, mode: str = "repeat", align: str = "auto") -> None:
        self.mode = _one_of("mode", mode, PLACE_MODES)
        self.align = _one_of("align", align, ALIGNMENTS)

    def __call__(self, img: NdarrayOrTensor, reference: NdarrayOrTensor) -> Tensor:
        """Place.

        Args:
            img: (C, h, w, d), the coarse mask, non-zero where there is something ("trilinear": values).
            reference: (C', H, W, D), any volume on the fine grid; its values are not used.

        Returns:
            (C, H, W, D), uint8 of 0 and 1 (float32 with "trilinear"), with the metadata of ``reference``.

        Raises:
            ValueError: a volume is not (C, H, W, D), an affine is missing, or what is occupied lies outside of the
                fine grid as a whole.
        """
        coarse, fine = _volume(img, "ResampleToGrid"), _volume(reference, "ResampleToGrid")
        to_coarse, shape = fine_to_coarse(coarse, fine, self.align), fine.shape[1:]
        if self.mode == "trilinear":
            return _on_grid_of(interpolate_cells(_plain(coarse).float(), to_coarse, shape), fine)
        check_mask(coarse, "ResampleToGrid")
        cells = (_plain(coarse) != 0).to(torch.uint8)
        if self.mode == "repeat":
            placed = repeat_cells(cells, to_coarse, shape)
        else:
            placed = mark_cells(cells, to_coarse, shape, corner=self.mode == "corner")
        if bool(cells.any()) and not bool(placed.any()):
            raise ValueError(
                f"no occupied cell of the coarse mask lies in the fine grid of {tuple(shape)} voxels; check that both "
                "files have their affines and show one patient."
            )
        return _on_grid_of(placed, fine)


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
    """

    backend = DownsampleMask.backend

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


class ResampleToGridd(MapTransform):
    """Dictionary version of :class:`ResampleToGrid`.

    Args:
        keys: coarse masks.
        reference_key: a volume on the fine grid.
        placed_key: where the placed masks go, one name per key; None: in place of the coarse ones.
        mode: see :class:`ResampleToGrid`.
        align: see :class:`ResampleToGrid`.
        allow_missing_keys: pass over masks that are not there.
    """

    backend = ResampleToGrid.backend

    def __init__(
        self,
        keys: KeysCollection,
        reference_key: str,
        placed_key: str | Sequence[str] | None = None,
        mode: str = "repeat",
        align: str = "auto",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_key = reference_key
        self.placed_keys = ensure_tuple_rep(placed_key, len(self.keys)) if placed_key is not None else self.keys
        self.place = ResampleToGrid(mode, align)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the placed masks to a copy of ``data``."""
        result = dict(data)
        for key, placed_key in self.key_iterator(result, self.placed_keys):
            result[placed_key] = self.place(result[key], result[self.reference_key])
        return result


DownsampleMaskD = DownsampleMaskDict = DownsampleMaskd
ResampleToGridD = ResampleToGridDict = ResampleToGridd


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    return value


def _positive(name: str, value: Any, least: float, exception: int | None = None) -> tuple[float, ...] | None:
    """One number per axis, or None."""
    if value is None:
        return None
    numbers = tuple(float(n) for n in ensure_tuple_rep(value, 3))
    if not all(n >= least or n == exception for n in numbers):
        extra = "" if exception is None else f", or {exception} to keep an axis"
        raise ValueError(f"{name} must be at least {least}{extra}, got {value}.")
    return numbers


def _volume(img: NdarrayOrTensor, who: str) -> Tensor:
    volume = convert_to_tensor(img, track_meta=isinstance(img, MetaTensor))
    if volume.ndim != 4 or min(volume.shape) < 1:
        raise ValueError(f"{who} takes (C, H, W, D), got {tuple(volume.shape)}; add the missing axes.")
    check_finite(volume, who)
    return volume


def _plain(volume: Tensor) -> Tensor:
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume


def _on_grid_of(values: Tensor, like: Tensor, affine: Tensor | None = None) -> Tensor:
    """Give a result the metadata of a MetaTensor, and another affine if one is given."""
    if not (isinstance(like, MetaTensor) and get_track_meta()):
        return values
    result = MetaTensor(values).copy_meta_from(like)
    if affine is not None:
        result.affine = affine
    return result

"""A volume as an ordered sequence of slabs, and back."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor

from monai_memeff.arguments import check_axis, numbers_checked
from monai_memeff.clstm.slabs import TOLERANCE, affine_of, check_that_slabs_continue, shifted


class SliceSequence(Transform):
    """Cut a volume into slabs along one axis, in order, each with its own place in space.

    Without overlap the slabs are for :class:`~monai_memeff.clstm.SlabInferer`, which hands the state from one to the
    next. With overlap every slab but the first begins ``overlap`` slices early: a network without memory of the slab
    before warms up on them, and :meth:`inverse` drops what it said there.

    Args:
        slab: slices that each slab is there for, the last one the rest; or, with ``mm``, millimeters. Both are rounded
            to whole slices, ``slab`` to one at least.
        axis: spatial axis, 0 to 2 for H, W, D, or negative.
        overlap: slices (or millimeters) before these.
        mm: ``slab`` and ``overlap`` are millimeters, turned into slices by the volume's own slice spacing.
        spacing: slice spacing in millimeters that the network was trained with; a volume with another one (by more than
            1 %) is refused.

    Raises:
        ValueError: slab not positive, overlap negative, or no such axis.

    Examples:
        >>> volume, cut = torch.rand(1, 8, 8, 10), SliceSequence(slab=4, overlap=1)
        >>> [slab.shape[-1] for slab in cut(volume)]
        [4, 5, 3]
        >>> torch.equal(cut.inverse(cut(volume)), volume)
        True
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self, slab: float = 16, axis: int = 2, overlap: float = 0, mm: bool = False, spacing: float | None = None
    ) -> None:
        check_axis(axis)
        if not (0 < slab < math.inf and 0 <= overlap < math.inf and (spacing is None or 0 < spacing < math.inf)):
            raise ValueError(
                "slab and spacing must be positive and finite, overlap not negative, got "
                f"{slab}, {spacing} and {overlap}."
            )
        self.slab, self.axis, self.overlap, self.mm, self.spacing = slab, axis % 3, overlap, mm, spacing

    def __call__(self, img: NdarrayOrTensor) -> list[Tensor]:
        """Cut.

        Args:
            img: (C, H, W, D); a MetaTensor where spacing matters.

        Returns:
            Slabs (C, H, W, d), views of the volume; MetaTensors with affines of their own if the volume is one.

        Raises:
            ValueError: not (C, H, W, D), or the slice spacing is unknown, irregular or not ``spacing``.
        """
        volume = convert_to_tensor(img, track_meta=isinstance(img, MetaTensor))
        if volume.ndim != 4:
            raise ValueError(f"SliceSequence takes (C, H, W, D), got {tuple(volume.shape)}; add a channel first.")
        slab, overlap = self.in_slices(volume)
        depth = volume.shape[1 + self.axis]
        return [_part(volume, self.axis, max(0, z - overlap), min(z + slab, depth)) for z in range(0, depth, slab)]

    def in_slices(self, volume: Tensor) -> tuple[int, int]:
        """``slab`` and ``overlap`` in slices of this volume."""
        spacing = self._spacing_of(volume)
        if not self.mm:
            return max(1, round(self.slab)), round(self.overlap)
        assert spacing is not None
        return max(1, round(self.slab / spacing)), round(self.overlap / spacing)

    def inverse(self, slabs: list[Tensor]) -> Tensor:
        """Put slabs (C, H, W, d) of this transform together again; overlaps come from the slab before.

        Numbers of channels may differ from those of the image (logits, labels).

        Raises:
            ValueError: the slabs do not continue each other.
        """
        if not slabs:
            raise ValueError("SliceSequence.inverse needs at least one slab.")
        overlap = self.in_slices(slabs[0])[1] if self.overlap else 0
        depth = 0
        parts: list[Tensor] = []
        for slab in slabs:
            skipped = min(depth, overlap)
            parts.append(_part(slab, self.axis, skipped, slab.shape[1 + self.axis]))
            depth += parts[-1].shape[1 + self.axis]
        list(check_that_slabs_continue([part[None] for part in parts], self.axis))
        plain = torch.cat([part.as_subclass(Tensor) for part in parts], dim=1 + self.axis)
        return _with_affine(plain, slabs[0], affine_of(slabs[0]))

    def _spacing_of(self, volume: Tensor) -> float | None:
        affine = affine_of(volume)
        if affine is None:
            if self.mm or self.spacing is not None:
                raise ValueError("SliceSequence needs the slice spacing: load the volume as a MetaTensor (LoadImage).")
            return None
        found = float(np.linalg.norm(affine[:3, self.axis]))
        if self.spacing is not None and abs(found / self.spacing - 1) > TOLERANCE:
            raise ValueError(
                f"slices lie {found:.4g} mm apart, {self.spacing:.4g} mm are expected; resample with Spacingd first."
            )
        return found


class SliceSequenced(MapTransform, InvertibleTransform):
    """Dictionary version of :class:`SliceSequence`: every volume becomes a list of slabs, in place.

    A loader with MONAI's collate functions makes of it a list of batches (B, C, H, W, d), which ``SlabInferer`` takes
    as it is.

    Args:
        keys: volumes (C, H, W, D) on one grid.
        slab: see :class:`SliceSequence`, also for what follows.
        axis: spatial axis.
        overlap: slices before each slab.
        mm: whether both are millimeters.
        spacing: slice spacing that is expected.
        allow_missing_keys: pass over volumes that are not there.

    Raises:
        ValueError: the volumes have different numbers or spacings of slices.

    Examples:
        >>> parts = SliceSequenced("image", slab=2)({"image": torch.rand(1, 16, 16, 5)})["image"]
        >>> [part.shape[-1] for part in parts]
        [2, 2, 1]
    """

    backend = SliceSequence.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        slab: float = 16,
        axis: int = 2,
        overlap: float = 0,
        mm: bool = False,
        spacing: float | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cut = SliceSequence(slab, axis, overlap, mm, spacing)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Cut every volume."""
        result = dict(data)
        known: tuple[int, float | None] | None = None
        for key in self.key_iterator(result):
            volume = result[key]
            affine = affine_of(volume)
            spacing = None if affine is None else round(float(np.linalg.norm(affine[:3, self.cut.axis])), 3)
            found = (volume.shape[1 + self.cut.axis], spacing)
            if known not in (None, found):
                raise ValueError(f"volumes must share slices: (number, spacing in mm) {known} and {found} ({key}).")
            known = found
            result[key] = self.cut(volume)
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Put every list of slabs together again."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.cut.inverse(result[key])
        return result


SliceSequenceD = SliceSequenceDict = SliceSequenced


def _part(volume: Tensor, axis: int, first: int, last: int) -> Tensor:
    """Slices first ... last - 1 of (C, H, W, D), with their place in space."""
    affine = affine_of(volume)
    plain = volume.as_subclass(Tensor).narrow(1 + axis, first, last - first)
    return _with_affine(plain, volume, None if affine is None else shifted(affine, axis, first))


def _with_affine(plain: Tensor, like: Tensor, affine: np.ndarray | None) -> Tensor:
    if affine is None:
        return plain
    result = MetaTensor(plain).copy_meta_from(like)
    result.affine = torch.from_numpy(affine)
    return result

"""Bone on a grid of another spacing without the CT on that grid: MONAI's Spacing and a threshold, slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import AFFINE_TOL
from monai.transforms import (
    InvertibleTransform,
    KeepLargestConnectedComponent,
    MapTransform,
    Spacing,
    SpatialResample,
)
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import TraceKeys, TransformBackends, ensure_tuple
from torch import Tensor

from monai_memeff.arguments import check_number, numbers_checked
from monai_memeff.geometry.grid import crop_affine
from monai_memeff.sparse.transforms.masks import as_volume

SLAB = 2_000_000  # voxels resampled at once: about 0.2 GB of coordinates


class ThresholdAtSpacing(InvertibleTransform):
    """Bring a CT to a spacing and threshold it, as MONAI's ``Spacing`` and ``AsDiscrete`` do, in a part of the memory.

    ``Spacing`` holds the resampled CT and three coordinates of 64 bits for every voxel of it: 16 GB for a CT of
    512 x 512 x 234 at half its spacing. Here one slab of voxels exists at a time, only where bone can be, and one byte
    per voxel stays. The interpolation is the same (trilinear, 64 bits, edges repeated), so is the grid. The inverse
    interpolates as that of ``Spacing``, in slabs as well.

    Args:
        pixdim: millimeters per voxel, one number or one per axis; an axis with a number that is not positive keeps its
            spacing.
        threshold: interpolated values at or above it are bone.
        components: Number of largest 26-connected pieces to keep in every channel; 0 keeps all.

    Raises:
        ValueError: ``components`` is negative, or a number is NaN or infinite.

    Examples:
        >>> ct = torch.full((1, 8, 8, 8), 400.0)  # without an affine, voxels are 1 mm
        >>> ThresholdAtSpacing(pixdim=2.0, threshold=300)(ct).shape
        torch.Size([1, 4, 4, 4])
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, pixdim: float | Sequence[float], threshold: float, components: int = 0) -> None:
        super().__init__()
        if components < 0:
            raise ValueError(f"components must not be negative, got {components}.")
        check_number("threshold", threshold)
        for size in ensure_tuple(pixdim):
            check_number("pixdim", size)
        self.spacing = Spacing([pixdim] * 3 if isinstance(pixdim, (int, float)) else pixdim)
        self.threshold, self.components = threshold, components

    def __call__(self, img: Tensor) -> MetaTensor:
        """Resample and threshold.

        Args:
            img: (C, H, W, D), finite; the affine of a MetaTensor, else one of 1 mm.

        Returns:
            (C, h, w, d) uint8, 1 is bone, with the metadata of ``img`` and the affine of the new grid.

        Raises:
            ValueError: ``img`` is not (C, H, W, D), or holds NaN or infinity.
            TypeError: ``img`` is not a tensor or an array.
        """
        img = as_volume(img)
        img = img if isinstance(img, MetaTensor) else MetaTensor(img)
        planned = self.spacing(img, lazy=True)
        grid = planned.peek_pending_affine(), planned.peek_pending_shape()
        bone, affine = _resampled(img, *grid, torch.uint8, lambda values: values >= self.threshold)
        if self.components:
            _keep_largest(bone, self.components)
        result = MetaTensor(bone).copy_meta_from(img)
        result.affine = affine
        self.push_transform(
            result, orig_size=tuple(img.shape[1:]), extra_info={"mode": "bilinear", "src_affine": img.affine}
        )
        return result

    def inverse(self, data: MetaTensor) -> MetaTensor:
        """Bring a volume back to the grid of the CT, by linear interpolation.

        Args:
            data: (C, h, w, d) with what this transform has noted, as ``Invertd`` gives it; best mostly zeros.

        Returns:
            (C, H, W, D) float32.
        """
        noted = self.pop_transform(data)
        extra = noted[TraceKeys.EXTRA_INFO]
        grid = extra["src_affine"], noted[TraceKeys.ORIG_SIZE]
        values, affine = _resampled(data, *grid, torch.float32, lambda values: values, extra["mode"])
        result = MetaTensor(values).copy_meta_from(data)
        result.affine = affine
        return result


class ThresholdAtSpacingd(MapTransform, InvertibleTransform):
    """Dictionary version of :class:`ThresholdAtSpacing`, which has an example; ``Invertd`` undoes it.

    Args:
        keys: CTs.
        pixdim: see :class:`ThresholdAtSpacing`.
        threshold: see :class:`ThresholdAtSpacing`.
        components: see :class:`ThresholdAtSpacing`.
        allow_missing_keys: whether a dictionary without a key passes through.
    """

    backend = ThresholdAtSpacing.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        pixdim: float | Sequence[float],
        threshold: float,
        components: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spacing = ThresholdAtSpacing(pixdim, threshold, components)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace CTs by their bone in a copy of ``data``."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.spacing(result[key])
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring volumes back to the grid of their CT."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.spacing.inverse(result[key])
        return result


ThresholdAtSpacingD = ThresholdAtSpacingDict = ThresholdAtSpacingd


def _resampled(
    img: MetaTensor,
    affine: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    finish: Callable[[Tensor], Tensor],
    mode: str = "bilinear",
) -> tuple[Tensor, Tensor]:
    """A volume on another grid, slab by slab, and the affine of that grid; MONAI's own where nothing moves.

    ``finish`` takes interpolated values to what is kept; a voxel is computed only if ``finish`` keeps a voxel that it
    may be interpolated from, so it must not keep what lies between values that it drops.
    """
    values, source = img.as_tensor(), torch.as_tensor(img.affine, dtype=torch.float64)
    target = torch.as_tensor(affine, dtype=torch.float64)
    step = torch.linalg.solve(source, target)  # index on the new grid -> index in the volume
    still = (torch.allclose(*pair, atol=AFFINE_TOL) for pair in ((source, target), (step, torch.eye(4).to(step))))
    if tuple(shape) == values.shape[1:] and any(still):
        return finish(values.float()).to(dtype), source
    result = torch.zeros((len(values), *shape), dtype=dtype, device=values.device)
    box = _reached(finish(values) != 0, step, shape)
    resample = SpatialResample(mode=mode, padding_mode="border", align_corners=False, dtype=torch.float64)
    depth = max(1, SLAB // max(1, (box[1].stop - box[1].start) * (box[2].stop - box[2].start)))
    for first in range(box[0].start, box[0].stop, depth):
        slab = (slice(first, min(first + depth, box[0].stop)), *box[1:])
        i, j, k = _range(step, [(s.start, s.stop - 1) for s in slab], values.shape[1:])
        near = MetaTensor(values[:, i, j, k], affine=crop_affine(source, [i.start, j.start, k.start]))
        part = resample(near, crop_affine(target, [s.start for s in slab]), [s.stop - s.start for s in slab])
        result[:, slab[0], slab[1], slab[2]] = finish(part.as_tensor()).to(dtype)
    return result, target


def _keep_largest(bone: Tensor, components: int) -> None:
    """Empty all but the largest pieces of (C, H, W, D) in place."""
    largest = KeepLargestConnectedComponent(applied_labels=1, is_onehot=False, num_components=components)
    for channel in bone[:, None]:
        box = (slice(None), *map(slice, *generate_spatial_bounding_box(channel, allow_smaller=True)))
        if bool(channel[box].any()):
            channel[box] = largest(channel[box]).as_subclass(Tensor)


def _reached(kept: Tensor, step: Tensor, shape: Sequence[int]) -> tuple[slice, slice, slice]:
    """The box of the new grid (of ``shape``) outside of which no voxel is interpolated from one in ``kept``."""
    start, stop = generate_spatial_bounding_box(kept, allow_smaller=True)
    whole = _corners([(0, n - 1) for n in shape], step)
    ends = []
    for axis, n in enumerate(kept.shape[1:]):  # beyond its edges, the volume's outer voxels are repeated
        low = int(start[axis]) - 1.0 if start[axis] > 0 else min(-1.0, float(whole[:, axis].min()))
        high = float(stop[axis]) if stop[axis] < n else max(float(n), float(whole[:, axis].max()))
        ends.append((low, high))
    if not stop[0] > start[0]:
        ends = [(0.0, 0.0)] * 3
    return _range(torch.linalg.inv(step), ends, shape)


def _range(step: Tensor, ends: Sequence[tuple[float, float]], shape: Sequence[int]) -> tuple[slice, slice, slice]:
    """The voxels of another grid (of ``shape``) around a box: with a margin, never empty."""
    corners = _corners(ends, step)
    slices = []
    for axis, n in enumerate(shape):
        low, high = int(corners[:, axis].min().floor()) - 1, int(corners[:, axis].max().ceil()) + 2
        start = min(max(low, 0), n - 1)
        slices.append(slice(start, max(min(high, n), start + 1)))
    return slices[0], slices[1], slices[2]


def _corners(ends: Sequence[tuple[float, float]], step: Tensor) -> Tensor:
    """(8, 3): where the corners of a box lie on another grid."""
    corners = torch.tensor(list(product(*ends)), dtype=torch.float64)
    return corners @ step[:3, :3].T + step[:3, 3]

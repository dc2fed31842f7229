"""Some classes of logits brought to the grid of the image, with the numbers of nnU-Net's own resampling.

Every resampling function of nnU-Net that is listed in :data:`BY_CLASS` treats each class for itself, so it is called
for a class at a time. One case is done in pieces, because nnU-Net needs 80 bytes per voxel for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
from scipy.ndimage import map_coordinates
from skimage.transform import resize

from nnunet_plugins.lean.predict.window import BLOCK
from nnunet_plugins.lean.stock import RESAMPLING, unchanged

BY_CLASS = (resample_data_or_seg_to_shape, no_resampling_hack)


def function_of(configuration_manager: Any) -> partial[Any]:
    """The configuration's resampling function for logits, with its settings."""
    found: partial[Any] = configuration_manager.resampling_fn_probabilities
    return found


def class_by_class(function: Any) -> bool:
    """Whether the function may be called for a class at a time: it is known, and resamples no labels."""
    if not isinstance(function, partial) or function.func not in BY_CLASS:
        return False
    if function.func is resample_data_or_seg_to_shape and not _own_resampling():
        return False
    return not function.args and not function.keywords.get("is_seg", False)


def _own_resampling() -> bool:
    """Whether what nnU-Net's resampling calls is its own, of which :func:`resampled` does a part in pieces."""
    calls = vars(import_module(RESAMPLING))
    libraries = calls["resize"] is resize and calls["map_coordinates"] is map_coordinates
    names = ("determine_do_sep_z_and_axis", "get_do_separate_z", "get_lowres_axis", "resample_data_or_seg")
    return libraries and unchanged(RESAMPLING, *names)


def resampled(
    volumes: np.ndarray,
    shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    function: partial[Any],
) -> np.ndarray:
    """Classes (classes, X, Y, Z) on a grid of ``shape``, in their own type.

    Args:
        volumes: Logits of some classes.
        shape: Of the result, in voxels.
        spacing: Of the logits, in mm.
        new_spacing: Of the result, in mm.
        function: See :func:`function_of`.
    """
    shape, settings = [int(extent) for extent in shape], function.keywords
    axis = separate_axis(function, spacing, new_spacing)
    if axis is not None and settings.get("order_z", 0) in (0, 1) and volumes.shape[1 + axis] != shape[axis]:
        order, order_z = settings.get("order", 3), settings.get("order_z", 0)
        return np.stack([_separately(volume, shape, axis, order, order_z) for volume in volumes])
    result: np.ndarray = function(volumes, shape, spacing, new_spacing)
    return result


def separate_axis(function: partial[Any], spacing: Sequence[float], new_spacing: Sequence[float]) -> int | None:
    """The axis that nnU-Net resamples on its own, after the planes across it; None when there is none."""
    if function.func is not resample_data_or_seg_to_shape:
        return None
    settings = function.keywords
    thresholds = {k: v for k, v in settings.items() if k == "separate_z_anisotropy_threshold"}
    force = settings.get("force_separate_z", False)
    separate, axis = determine_do_sep_z_and_axis(force, spacing, new_spacing, **thresholds)
    return int(axis) if separate and axis is not None else None


def _separately(volume: np.ndarray, shape: Sequence[int], axis: int, order: int, order_z: int) -> np.ndarray:
    """Resample in the planes first and then along the axis, which nnU-Net does for anisotropic images."""
    between = [volume.shape[axis] if a == axis else extent for a, extent in enumerate(shape)]
    in_plane = tuple(extent for a, extent in enumerate(shape) if a != axis)
    planes = np.zeros(between)
    for source, target in zip(np.moveaxis(volume, axis, 0), np.moveaxis(planes, axis, 0), strict=True):
        target[...] = resize(source.astype(float), in_plane, order, mode="edge", anti_aliasing=False)
    result = np.zeros(shape, volume.dtype)
    scales = [float(a) / b for a, b in zip(between, shape, strict=True)]
    for rows in _slabs(shape):
        points = np.mgrid[rows, : shape[1], : shape[2]]
        at = np.array([scale * (index + 0.5) - 0.5 for scale, index in zip(scales, points, strict=True)])
        result[rows] = map_coordinates(planes, at, order=order_z, mode="nearest")
    return result


def _slabs(shape: Sequence[int]) -> Iterator[slice]:
    step = max(1, BLOCK // (80 * shape[1] * shape[2]))
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))

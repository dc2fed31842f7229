"""nnU-Net's resampling of images before prediction, with its numbers in half of its memory.

For a spline of order 3 scikit-image and SciPy hold the image in double precision three times: as it is, padded, and
filtered. Here it is padded as it is copied, and filtered in place. A trial decides once in every process whether that
gives the bits of the installed versions; if not, theirs are called.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from scipy import ndimage
from skimage.transform import resize

from nnunet_plugins.lean.export.resample import class_by_class, resampled, separate_axis
from nnunet_plugins.lean.stock import PREPROCESSOR, unchanged

PADDING = 12
"""Voxels by which SciPy extends an image before its filter."""


class LeanPreprocessing(ConfigurationManager):
    """A configuration whose images are resampled in less memory, and whose labels, which nobody reads, not at all."""

    @property
    def resampling_fn_data(self) -> Any:
        """See :func:`resampling_of`."""
        return resampling_of(super().resampling_fn_data)

    @property
    def resampling_fn_seg(self) -> Any:
        """Leaves labels as they are: there are none but the mask of what is not zero, which was used before."""
        function = super().resampling_fn_seg

        def untouched(labels: np.ndarray, shape: Sequence[int], *spacings: Any) -> Any:
            return labels if all(shape) else function(labels, shape, *spacings)  # which nnU-Net refuses in its words

        return untouched


def lean_configuration(configuration: ConfigurationManager) -> ConfigurationManager:
    """The same configuration for images without labels; itself when its preprocessor is not nnU-Net's own."""
    own = type(configuration) is ConfigurationManager and configuration.preprocessor_class is DefaultPreprocessor
    own = own and unchanged(PREPROCESSOR, "DefaultPreprocessor.run_case", "DefaultPreprocessor.run_case_npy")
    return LeanPreprocessing(configuration.configuration) if own else configuration


def resampling_of(function: Any) -> Any:
    """A function that does what one of nnU-Net's does for images (C, X, Y, Z), a channel at a time."""
    if not class_by_class(function) or function.func is not resample_data_or_seg_to_shape:
        return function
    return partial(_by_channel, function)


def _by_channel(
    function: Any, data: np.ndarray, shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> np.ndarray:
    shape = tuple(int(extent) for extent in shape)
    if data.shape[1:] == shape:
        return data
    if not all(shape):  # which nnU-Net refuses in its words
        result: np.ndarray = function(data, shape, spacing, new_spacing)
        return result
    order = function.keywords.get("order", 3)
    splines = order > 1 and separate_axis(function, spacing, new_spacing) is None and reproduces(order)
    result = np.zeros((len(data), *shape), data.dtype)
    for number, channel in enumerate(data):
        if splines and not np.isnan(channel).any():
            result[number] = by_splines(channel, shape, order)
        else:
            result[number] = resampled(channel[None], shape, spacing, new_spacing, function)[0]
    return result


def by_splines(volume: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    """What ``resize(volume.astype(float), shape, order, mode="edge", anti_aliasing=False)`` gives.

    Args:
        volume: (X, Y, Z), without NaN.
        shape: Of the result.
        order: Of the spline, 2 ... 5.
    """
    from scipy.ndimage import _nd_image, _ni_support

    filtered = np.empty([extent + 2 * PADDING for extent in volume.shape])
    filtered[(slice(PADDING, -PADDING),) * volume.ndim] = volume
    for axis in range(volume.ndim):
        planes = np.moveaxis(filtered, axis, 0)
        planes[:PADDING], planes[-PADDING:] = planes[PADDING], planes[-PADDING - 1]
    for axis in range(volume.ndim):
        ndimage.spline_filter1d(filtered, order, axis, output=filtered, mode="nearest")
    result = np.zeros(shape)
    zoom = np.divide(np.array(volume.shape), np.array(shape), dtype=np.float64)
    mode = _ni_support._extend_mode_to_code("nearest")
    _nd_image.zoom_shift(filtered, zoom, None, result, order, mode, 0.0, PADDING, True)
    lowest, highest = (np.asarray(np.float64(value)) for value in (volume.min(), volume.max()))
    np.clip(result, lowest, highest, out=result)
    return result


@functools.cache
def reproduces(order: int) -> bool:
    """Whether :func:`by_splines` gives the bits of the installed scikit-image and SciPy."""
    rng = np.random.default_rng(0)
    try:
        for before, after in (((9, 14, 11), (13, 7, 11)), ((1, 6, 5), (1, 9, 8)), ((8, 7, 6), (3, 4, 1))):
            volume = rng.normal(0, 100, before).astype(np.float32)
            expected = resize(volume.astype(float), after, order, mode="edge", anti_aliasing=False)
            if not np.array_equal(by_splines(volume, after, order), expected):
                return False
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):  # SciPy's inside, which may change
        return False
    return True

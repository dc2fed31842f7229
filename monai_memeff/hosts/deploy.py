"""What the reader of MONAI Deploy App SDK 4.0.0 changes without a word, refused before an application starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_memeff.data import read_volume
from monai_memeff.errors import InputError


def require_deploy_reads(folder: Path) -> None:
    """Refuse a DICOM series that the SDK's ``DICOMSeriesToVolumeOperator`` would read otherwise than it is.

    It gives pixels each other's width and height, and stores all slices in the type of the first one: negative values
    wrap around where that has none, and fractions are cut off where that has none.

    Args:
        folder: the series.

    Raises:
        InputError: pixels that are not square, values that the first slice's type does not hold, or a series that
            :func:`~monai_memeff.data.read_volume` refuses.
    """
    image = read_volume(folder).image
    width, height = np.linalg.norm(image.affine.numpy()[:3, :2], axis=0)
    if not np.isclose(width, height, rtol=1e-5):
        raise InputError(
            f"{folder} has pixels of {width:g} x {height:g} mm, and MONAI Deploy App SDK 4.0.0 swaps the two: use "
            f"memeff run"
        )
    values = image.as_tensor().numpy()[0]
    for first in (values[..., 0], values[..., -1]):  # the SDK may begin at either end
        kind = _kind_of(first)
        low, high = np.iinfo(kind).min if kind is not None else -np.inf, np.iinfo(kind).max if kind else np.inf
        if values.min() < low or values.max() > high or (kind is not None and (values != np.round(values)).any()):
            raise InputError(
                f"{folder} has values that the type of its first slice ({np.dtype(kind).name}) does not hold, and "
                f"MONAI Deploy App SDK 4.0.0 stores all slices in that: use memeff run"
            )


def _kind_of(values: np.ndarray) -> type[np.integer] | None:
    """The integer type in which the SDK stores a first slice of these values; None for floating point."""
    if (values != np.round(values)).any():
        return None
    if values.min() > 0 and values.max() < 2**16:
        return np.uint16
    return np.int16 if values.min() >= -(2**15) and values.max() < 2**15 else None

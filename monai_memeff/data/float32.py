"""Voxels as float32, in which volumes are computed: rounded as real numbers are, or refused where a number is lost."""

from __future__ import annotations

import numpy as np

from monai_memeff.errors import InputError

LARGEST = 2**24
"""float32 holds every integer up to this one, and not every one beyond."""


def as_float32(values: np.ndarray, source: object) -> np.ndarray:
    """The same numbers as float32, any shape.

    Args:
        values: integers, each of which must have a value in float32, or real numbers, which are rounded. Real numbers
            without a fraction are labels of an atlas, as they may be stored, and like integers.
        source: where they are from, for the message.

    Raises:
        InputError: an integer that float32 lacks, or a number beyond its range.
    """
    if values.dtype.itemsize > 2 and values.dtype != np.float32 and _are_whole(values):
        lost = next((v for v in np.unique(values[_beyond(values)]).tolist() if int(np.float32(v)) != v), None)
        if lost is not None:
            raise InputError(
                f"cannot read {source}: it holds the integer {lost}, and float32, in which volumes are computed, holds "
                f"those up to {LARGEST}; give labels smaller numbers, or store scaled values as float."
            )
    with np.errstate(over="raise"):
        try:
            return values.astype(np.float32, copy=False)
        except FloatingPointError:
            largest = f"{np.finfo(np.float32).max:.2g}, the largest of float32"
            raise InputError(
                f"cannot read {source}: it holds numbers beyond {largest}, in which volumes are computed; scale them."
            ) from None


def _beyond(values: np.ndarray) -> np.ndarray:
    return values > LARGEST if values.dtype.kind == "u" else (values > LARGEST) | (values < -LARGEST)


def _are_whole(values: np.ndarray) -> bool:
    """Integers, or real numbers that might be some; numbers beyond the range of float32 have a refusal of their own."""
    if values.dtype.kind in "iu":
        return True
    return bool(_beyond(values).any() and (np.abs(values) < 2**53).all() and (values == np.rint(values)).all())

"""What transforms of coarse masks share: checks of volumes and arguments, and results with metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.config import NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta
from monai.utils import convert_to_tensor, ensure_tuple_rep
from torch import Tensor

from monai_memeff.checks import check_finite


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    return value


def positive(name: str, value: Any, least: float, exception: int | None = None) -> tuple[float, ...] | None:
    """One number per axis, or None."""
    if value is None:
        return None
    numbers = tuple(float(n) for n in ensure_tuple_rep(value, 3))
    if not all(n >= least or n == exception for n in numbers):
        extra = "" if exception is None else f", or {exception} to keep an axis"
        raise ValueError(f"{name} must be at least {least}{extra}, got {value}.")
    return numbers


def checked_volume(img: NdarrayOrTensor, who: str) -> Tensor:
    volume = convert_to_tensor(img, track_meta=isinstance(img, MetaTensor))
    if not isinstance(volume, Tensor):
        raise TypeError(f"{who} takes a tensor or an array of numbers, got {type(img).__name__}; load it first.")
    if volume.ndim != 4 or min(volume.shape) < 1:
        raise ValueError(f"{who} takes (C, H, W, D), got {tuple(volume.shape)}; add the missing axes.")
    check_finite(volume, who)
    return volume


def plain(volume: Tensor) -> Tensor:
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume


def on_grid_of(values: Tensor, like: Tensor, affine: Tensor | None = None) -> Tensor:
    """Give a result the metadata of a MetaTensor, and another affine if one is given."""
    if not (isinstance(like, MetaTensor) and get_track_meta()):
        return values
    result = MetaTensor(values).copy_meta_from(like)
    if affine is not None:
        result.affine = affine
    return result

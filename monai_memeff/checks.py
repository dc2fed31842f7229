"""What networks and transforms refuse of their input: NaN, infinity, and numbers their arithmetic cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monai_memeff.errors import InputError

UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def has_values(values: Tensor) -> bool:
    """Whether a tensor has values to be checked: one on the meta device or of a dry run has shape and dtype alone."""
    return not values.is_meta and not getattr(getattr(values, "fake_mode", None), "is_dry_run", False)


def plain(values: Tensor) -> Tensor:
    """The tensor without MONAI's metadata; one of a dry run has none, and torch before 2.10 makes no other of it."""
    return values if hasattr(values, "fake_mode") else values.as_subclass(Tensor)


def computable(values: Tensor) -> Tensor:
    """The same numbers in a dtype that torch computes with: unsigned ones of 16 to 64 bits and floats of 8 are none."""
    if values.is_floating_point():
        return values.float() if values.dtype.itemsize == 1 else values
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
    return values.to(wider.get(values.dtype, values.dtype))


def check_tensor(values: Any, owner: str) -> None:
    """Refuse what is not a tensor: TypeError."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{owner} takes a tensor, got {type(values).__name__}; use torch.as_tensor.")


def check_real(values: Tensor, owner: str) -> None:
    """Refuse complex numbers: InputError."""
    if values.is_complex():
        raise InputError(f"{owner} takes real numbers, got {values.dtype}; give parts or magnitudes as channels.")


def check_finite(values: Tensor, owner: str) -> None:
    """Refuse NaN, infinity and complex numbers.

    Args:
        values: any shape; integers and booleans are finite.
        owner: name of what takes them, the subject of the message.

    Raises:
        InputError: a value is NaN or infinite; the message counts them.
    """
    known, values = has_values(values), plain(values.detach())
    check_real(values, owner)
    if not values.is_floating_point() or values.numel() == 0 or not known:
        return
    values = computable(values)
    if all(bool(bound.isfinite()) for bound in values.aminmax()):  # either bound is NaN where any value is
        return
    bad = int((~values.isfinite()).sum())
    raise InputError(
        f"{owner} needs finite values, got {bad} NaN or infinite; replace them first, with torch.nan_to_num say."
    )


def check_logits(logits: Tensor, name: str) -> Tensor:
    """The logits of a network; refuse NaN, which no comparison is true of: every voxel would be background.

    Raises:
        InputError: a logit is NaN, as broken weights and overflows of half precision make them.
    """
    if logits.numel() and has_values(logits) and bool(logits.detach().as_subclass(Tensor).amin().isnan()):
        raise InputError(f"{name} gave logits that are NaN; check the network's weights and the scale of the volume.")
    return logits


def check_mask(values: Tensor, owner: str) -> None:
    """Refuse what cannot be a mask, whose voxels are something where they are not zero: NaN, infinity, and negatives.

    Negative numbers are logits or intensities, and every one of them would count as something.

    Raises:
        InputError: a value is NaN, infinite or negative.
    """
    check_finite(values, owner)
    known, values = has_values(values), plain(values.detach())
    if values.dtype in UNSIGNED or values.numel() == 0 or not known:
        return
    lowest = computable(values).amin()
    if bool(lowest < 0):
        raise InputError(
            f"{owner} needs masks, which are zero where nothing is and positive elsewhere, got {lowest.item():g}; "
            "compare logits or intensities with a threshold first."
        )


def check_labels(values: Tensor, owner: str, classes: int | None = None) -> None:
    """Refuse values that are not labels: NaN, fractions, negatives, and those beyond the classes.

    Args:
        values: any shape.
        owner: name of what takes them.
        classes: Number of classes, if it is known.

    Raises:
        InputError: a value is not a label.
    """
    values = plain(values.detach())
    check_finite(values, owner)
    if values.dtype == torch.bool or values.numel() == 0 or values.is_meta:
        return
    numbers = computable(values)
    if numbers.is_floating_point() and not bool((numbers == numbers.round()).all()):
        raise InputError(f"{owner} needs labels, which are whole numbers, got fractions; take argmax or a threshold.")
    low, high = (int(bound) for bound in numbers.aminmax())
    if low < 0 or (classes is not None and high >= classes):
        known = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise InputError(
            f"{owner} needs labels of {known}, got {low if low < 0 else high}; map other values to these first."
        )


def as_network_input(values: Tensor, dtype: torch.dtype, owner: str) -> Tensor:
    """The same numbers in the dtype that a network computes in.

    Integers and booleans are converted, as every one of them has an exact value there. Another floating-point dtype is
    refused, for rounding is the caller's choice; under autocast torch itself converts all but float64.

    Args:
        values: input of the network.
        dtype: Type of the network's parameters.
        owner: name of the network.

    Raises:
        TypeError: no tensor.
        InputError: NaN, infinity, complex numbers, another floating-point dtype, or integers too large to be exact.
    """
    check_tensor(values, owner)
    check_real(values, owner)
    if values.is_floating_point():
        check_dtype(values, dtype, owner)
        check_finite(values, owner)
        return values
    _check_exact(values, dtype, owner)
    return values.to(dtype)


def check_layer(name: str, spec: Any, make: Callable[[], object]) -> None:
    """Refuse by the argument's name a layer that MONAI cannot make of it: ValueError.

    Args:
        name: Name of the argument.
        spec: MONAI's name of a layer, or the name and its arguments.
        make: makes the layer.
    """
    try:
        make()
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{name} {spec!r} makes no layer: {why}") from None


def as_device(device: str | int | torch.device) -> torch.device:
    """The device of a name: ValueError for what is none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a name such as cpu or cuda:0, got {device!r}.") from None


def check_dtype(values: Tensor, dtype: torch.dtype, owner: str) -> None:
    """Refuse floating-point numbers in another dtype than the network's, but where autocast converts them."""
    devices = {values.device.type, "cuda"}  # a volume may wait on the host for a network on a GPU
    autocast = any(map(torch.is_autocast_enabled, devices)) and torch.float64 not in (values.dtype, dtype)
    if values.dtype != dtype and not autocast:
        raise InputError(
            f"{owner} computes in {dtype}, got an input of {values.dtype}; convert the input with .to({dtype}), or the "
            "network with .to() of the input's dtype."
        )


def _check_exact(values: Tensor, dtype: torch.dtype, owner: str) -> None:
    limit = int(2 / torch.finfo(dtype).eps)  # 2^24 in float32: from there on not every integer has a value
    small = values.dtype == torch.bool or torch.iinfo(values.dtype).max <= limit
    if small or values.numel() == 0 or not has_values(values):
        return
    largest = max(abs(int(bound)) for bound in values.detach().as_subclass(Tensor).long().aminmax())
    if largest > limit:
        raise InputError(
            f"{owner} computes in {dtype}, which holds integers up to {limit} exactly, got {largest}; scale the input "
            "to floating point first."
        )

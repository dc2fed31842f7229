"""What constructors refuse of their numbers: NaN passes every comparison that asks whether it is too small."""

from __future__ import annotations

import math
from numbers import Integral


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``: ValueError."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_number(name: str, value: float, least: float = -math.inf) -> None:
    """Refuse NaN, infinity and what lies below ``least``: ValueError."""
    if not (math.isfinite(value) and value >= least):
        bound = "" if least == -math.inf else f" and at least {least:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value}.")


def check_axis(axis: int) -> None:
    """Refuse what is no axis of a volume: ValueError."""
    if not isinstance(axis, Integral) or not -3 <= axis <= 2:
        raise ValueError(f"axis must be a whole number in -3 ... 2, got {axis!r}.")

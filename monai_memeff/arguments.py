"""What constructors refuse of their numbers: no comparison with a bound is true of NaN, so it would pass."""

from __future__ import annotations

import math
from numbers import Integral


def check_count(name: str, value: int, least: int = 1) -> None:
    """ValueError unless it is a whole number of at least ``least``."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_number(name: str, value: float, least: float = -math.inf) -> None:
    """Refuse NaN, infinity and what lies below ``least``: ValueError."""
    if not (math.isfinite(value) and value >= least):
        bound = "" if least == -math.inf else f" and at least {least:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value}.")


def check_axis(axis: int) -> None:
    """ValueError unless it is an axis of a volume."""
    if not isinstance(axis, Integral) or not -3 <= axis <= 2:
        raise ValueError(f"axis must be a whole number in -3 ... 2, got {axis!r}.")

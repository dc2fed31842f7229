"""Bytes as people write them: "8GiB", "500 MB", "1073741824"."""

from __future__ import annotations

import math
import re

from monai_memeff.errors import InputError

UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1024), ("b", 1000), ("ib", 1024))
}


def bytes_of(text: str) -> int:
    """Number of bytes that a text says: a number and B, kB, MB, GB, TB (powers of 1000) or K, KiB, M, MiB, ... (1024).

    Raises:
        InputError: it says no positive number of bytes.

    Example::

        bytes_of("8GiB")  # 8589934592
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in UNITS or not math.isfinite(float(found[1])):
        raise InputError(f"a size is a number with a unit, such as 8GiB or 500MB, got {text!r}")
    size = int(float(found[1]) * UNITS[found[2]])
    if size < 1:
        raise InputError(f"a size must be at least 1 byte, got {text!r}")
    return size

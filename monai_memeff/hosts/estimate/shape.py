"""Shapes as people write them on a command line."""

from __future__ import annotations

import re

from monai_memeff.errors import InputError


def shape_of(text: str) -> tuple[int, ...]:
    """The shape (B, C, spatial...) of ``1,1,128,128,128``.

    Raises:
        InputError: anything else.
    """
    parts = re.split(r"\s*[,x]\s*", text.strip().strip("()[]"))
    if not all(re.fullmatch("[0-9]{1,9}", part) and int(part) > 0 for part in parts) or len(parts) < 3:
        raise InputError(
            f"--shape is batch, channels and extents, whole numbers from 1 on, such as 1,1,128,128,128, got {text!r}"
        )
    return tuple(int(part) for part in parts)

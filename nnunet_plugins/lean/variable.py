"""The variable that says how nnU-Net predicts: its value now, and whether that fits what stands in nnU-Net."""

from __future__ import annotations

import os

VARIABLE = "MEMEFF_NNUNET"


def chosen() -> str:
    """The variable's value, lower case; empty when prediction is stock's."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    return "" if value in ("0", "off") else value


def unknown_value() -> str | None:
    """Say that the variable has a value that means nothing; None when it has not."""
    value = chosen()
    return None if value in ("", "lean", "whole") else f"{VARIABLE} must be lean, whole or off, got {value!r}."


def check_unchanged(whole: bool) -> None:
    """Refuse to predict another way than the variable says; between lean and off it does not matter, labels are equal.

    Args:
        whole: The way that stands in nnU-Net: whole volumes, or tiles.

    Raises:
        RuntimeError: the variable changed to or from ``whole`` after nnU-Net was imported.
    """
    if (chosen() == "whole") != whole:
        before, now = ("whole", chosen() or "off") if whole else ("lean or off", "whole")
        raise RuntimeError(
            f"{VARIABLE} was {before} when nnU-Net's predictor was switched and is {now} now: set it before nnU-Net is "
            "imported, and leave it."
        )

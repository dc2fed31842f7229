"""Parts of a bundle that must say the same: its evaluator's arguments, and the names of its labels."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from monai.engines import SupervisedEvaluator

from monai_memeff.errors import InputError

ORGANS = "organs"
"""What the bundles of this package call the names of the labels 1, 2, ... in their configurations."""


def check_arguments(engine: dict[str, Any], folder: Path) -> None:
    """Refuse an evaluator with an argument that MONAI's lacks: misspelled, it would be left out without a word.

    Raises:
        InputError: there is one.
    """
    known = inspect.signature(SupervisedEvaluator.__init__).parameters
    odd = [name for name in engine if name not in known and not name.startswith("_")]
    if odd:
        raise InputError(
            f"the evaluator of {folder} has the argument {odd[0]}, which MONAI's lacks; check its spelling"
        )


def check_names(config: dict[str, Any], metadata: dict[str, Any], folder: Path) -> None:
    """Refuse labels that the configuration and the metadata, after which results are named, call by other names.

    Raises:
        InputError: they differ.
    """
    names = config.get(ORGANS)
    outputs = metadata.get("network_data_format", {}).get("outputs", {})
    said: dict[str, Any] = outputs.get("pred", {}).get("channel_def") or {}
    expected = [str(said[key]) for key in sorted((key for key in said if key.isdecimal() and key != "0"), key=int)]
    if isinstance(names, list) and expected and names != expected:
        raise InputError(
            f"the configuration of {folder} names its labels {', '.join(map(str, names))}, and its metadata.json "
            f"{', '.join(expected)}; give both the same names"
        )

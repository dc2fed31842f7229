"""nnU-Net's own functions, also while lean ones stand in their place.

The modules that hold lean functions import nothing of :data:`EXPORT` and :data:`PREDICTOR` when they are imported:
those two import them, through the start-up file's hook.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

EXPORT = "nnunetv2.inference.export_prediction"
PREDICTOR = "nnunetv2.inference.predict_from_raw_data"

REPLACED: dict[tuple[str, str], Any] = {}
"""(module, or module and class; name) -> what stood there before; filled by :mod:`nnunet_plugins.lean.switch`."""


def stock(module: str, name: str) -> Any:
    """The function that nnU-Net has under ``name`` in a module, not ours."""
    found = getattr(import_module(module), name)
    return REPLACED.get((module, name), found)

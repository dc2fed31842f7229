"""nnU-Net's own functions, also while lean ones stand in their place, and which of them others have replaced.

The modules that hold lean functions import nothing of :data:`EXPORT` and :data:`PREDICTOR` when they are imported:
those two import them, through the start-up file's hook.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

from torch.utils import _contextlib

EXPORT = "nnunetv2.inference.export_prediction"
PREDICTOR = "nnunetv2.inference.predict_from_raw_data"
ITERATORS = "nnunetv2.inference.data_iterators"
LABELS = "nnunetv2.utilities.label_handling.label_handling"
PREPROCESSOR = "nnunetv2.preprocessing.preprocessors.default_preprocessor"
RESAMPLING = "nnunetv2.preprocessing.resampling.default_resampling"
TOTALSEGMENTATOR = "totalsegmentator.nnunet_runtime_patches"
"""TotalSegmentator's own forms of some functions of the other two, which it puts there."""

REPLACED: dict[tuple[str, str], tuple[Any, Any]] = {}
"""(module, or module and class; name) -> what stood there before, and what stands there now; filled by
:mod:`nnunet_plugins.lean.switch`."""


def stock(module: str, name: str) -> Any:
    """The function that stands under ``name`` in a module when lean prediction is off."""
    before = {id(ours): old for old, ours in REPLACED.values()}
    found = getattr(import_module(module), name)
    while id(found) in before:
        found = before[id(found)]
    return found


def stock_method(name: str) -> Any:
    """The method ``name`` that nnUNetPredictor has when lean prediction is off."""
    key = (f"{PREDICTOR}.nnUNetPredictor", name)
    return REPLACED[key][0] if key in REPLACED else getattr(import_module(PREDICTOR).nnUNetPredictor, name)


def is_from(function: Any, module: str) -> bool:
    """Whether a function or method was written in a module: nobody replaced or wrapped it, but for torch's contexts."""
    function = getattr(function, "__func__", function)
    file = import_module(module).__file__
    while (code := getattr(function, "__code__", None)) is not None and code.co_filename != file:
        if code.co_filename != _contextlib.__file__ or not hasattr(function, "__wrapped__"):
            return False
        function = function.__wrapped__
    return code is not None


def unchanged(module: str, *names: str, here: str = "") -> bool:
    """Whether functions of a module, which ours do the same as, are nnU-Net's own: nobody replaced or wrapped them.

    Args:
        module: In which they are written.
        names: Of functions, or of methods as ``Class.method``.
        here: A module that imported them by name and calls them, if not ``module``.
    """
    owner = import_module(here or module)
    return all(is_from(functools.reduce(getattr, name.split("."), owner), module) for name in names)

"""Turns lean or whole-volume prediction on and off: by the variable when nnU-Net is imported, or around a block."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from nnunet_plugins.lean import fingerprint
from nnunet_plugins.lean.predict import files
from nnunet_plugins.lean.stock import EXPORT, PREDICTOR, REPLACED, TOTALSEGMENTATOR, is_from
from nnunet_plugins.lean.variable import VARIABLE, chosen, unknown_value

_OURS = "nnunet_plugins.lean."

# nnU-Net's module -> (class or "", name, our module with a function of that name)
TABLE: dict[str, tuple[tuple[str, str, str], ...]] = {
    EXPORT: (
        ("", "convert_predicted_logits_to_segmentation_with_correct_shape", "export.functions"),
        ("", "export_prediction_from_logits", "export.functions"),
        ("", "resample_and_save", "export.functions"),
    ),
    PREDICTOR: (
        ("nnUNetPredictor", "_internal_maybe_mirror_and_predict", "predict.sliding"),
        ("nnUNetPredictor", "predict_sliding_window_return_logits", "predict.sliding"),
        ("nnUNetPredictor", "predict_logits_from_preprocessed_data", "predict.folds"),
        ("nnUNetPredictor", "_internal_get_data_iterator_from_lists_of_filenames", "cases.preprocessing"),
        ("nnUNetPredictor", "predict_from_data_iterator", "cases.loop"),
        ("nnUNetPredictor", "predict_from_files_sequential", "cases.loop"),
        ("", "predict_entry_point", "cases.loop"),
        ("", "predict_entry_point_modelfolder", "cases.loop"),
    ),
    TOTALSEGMENTATOR: (
        ("", "convert_predicted_logits_to_segmentation_with_correct_shape", "export.totalsegmentator"),
        ("", "export_prediction_from_logits", "export.totalsegmentator"),
    ),
}

WHOLE = {("nnUNetPredictor", "predict_sliding_window_return_logits"): "predict.whole"}
"""What ``MEMEFF_NNUNET=whole`` takes from another module: (class, name) -> module; the rest is lean."""

_lock = threading.RLock()


def refusal() -> str | None:
    """Say why lean prediction cannot be used here; None when it can."""
    return files.supported() or fingerprint.refusal()


def on_import(name: str) -> None:
    """Replace functions of an nnU-Net module that was just imported; called by the start-up file's import hook.

    Unknown values end the process in one line before anything is predicted. An nnU-Net that is not known keeps its own
    functions, with a warning; with ``whole``, whose labels are not those of stock, the process ends then too.
    """
    value = chosen()
    if not value:
        return
    unknown = unknown_value()
    if unknown is not None:
        _end(unknown)
    reason = refusal()
    if reason is not None:
        if value == "whole":
            _end(f"{VARIABLE}=whole is not possible: {reason}. Unset it for stock prediction.")
        if name == PREDICTOR:
            print(f"WARNING: {VARIABLE}=lean has no effect: {reason}. Stock prediction is used.", file=sys.stderr)
        return
    _replace(name)


def _end(line: str) -> None:
    print(line, file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def lean_prediction() -> Iterator[None]:
    """Predict leanly inside the block, in this process and in the workers that nnU-Net starts from it.

    With ``MEMEFF_NNUNET=whole`` in the environment whole volumes are predicted, as outside of the block.

    Raises:
        RuntimeError: this nnU-Net, or this system, is not supported, or the variable has an unknown value.

    Examples:
        >>> with lean_prediction():
        ...     is_on()  # here predictor.predict_from_files("images", "out")
        True
        >>> is_on()
        False
    """
    reason = refusal()
    if reason is not None:
        raise RuntimeError(f"lean prediction is not possible: {reason}.")
    unknown = unknown_value()
    if unknown is not None:
        raise RuntimeError(unknown)
    with _lock:
        names = [EXPORT, PREDICTOR, *([TOTALSEGMENTATOR] if fingerprint.totalsegmentator() else [])]
        for name in names:
            import_module(name)
        if not is_on():
            _Blocks.switched = True
            for name in names:
                _replace(name)
        _Blocks.open += 1
    try:
        yield
    finally:
        with _lock:
            _Blocks.open -= 1
            if _Blocks.switched and not _Blocks.open:
                _Blocks.switched = False
                _restore()


class _Blocks:
    """How many blocks are open now, in all threads, and whether one of them did the switching."""

    open = 0
    switched = False


@contextmanager
def stock_prediction() -> Iterator[None]:
    """Predict as nnU-Net does inside the block, also while lean prediction is on."""
    with _lock:
        names = [name for name in TABLE if any(key[0].startswith(name) for key in REPLACED)]
        _restore()
        try:
            yield
        finally:
            for name in names:
                _replace(name)


def is_on() -> bool:
    """Whether lean functions stand in nnU-Net's modules now."""
    return bool(REPLACED)


def _replace(name: str) -> None:
    """Put our functions into a module of nnU-Net and wherever else its own were imported to.

    What others have put there stays: it is theirs to say what it does. Where they wrap or replace a step, the other
    steps are lean.
    """
    module, moved = sys.modules[name], []
    if name == TOTALSEGMENTATOR and not fingerprint.totalsegmentator():
        return
    for owner_name, attribute, ours in TABLE[name]:
        owner = getattr(module, owner_name) if owner_name else module
        key = (f"{name}.{owner_name}" if owner_name else name, attribute)
        old = _inside(getattr(owner, attribute))
        if key in REPLACED:
            continue
        if not is_from(old, name):
            _leave(old, attribute)
            continue
        if chosen() == "whole":
            ours = WHOLE.get((owner_name, attribute), ours)
        new = getattr(import_module(_OURS + ours), attribute)
        REPLACED[key] = (old, new)
        _put(owner, attribute, new)
        if not owner_name:
            moved.append((old, new))
    _everywhere(moved)


def _leave(function: Any, attribute: str) -> None:
    """Say whose function stays, unless it is one that is known and treated on its own."""
    theirs = getattr(function, "__globals__", {}).get("__name__", type(function).__name__)
    if theirs not in TABLE and not theirs.startswith(_OURS):
        print(f"WARNING: lean prediction keeps {attribute} of {theirs}, which replaced nnU-Net's.", file=sys.stderr)


def _inside(function: Any) -> Any:
    """What a wrapper for whole-volume networks wraps; anything else is itself."""
    return function.__wrapped__ if getattr(function, "whole_volume", False) else function


def _put(owner: Any, attribute: str, new: Any) -> None:
    """Set an attribute, behind the wrapper for whole-volume networks where there is one."""
    old = getattr(owner, attribute)
    if getattr(old, "whole_volume", False):
        old.__wrapped__ = new
    else:
        setattr(owner, attribute, new)


def _restore() -> None:
    """Give nnU-Net its own functions back, where nobody else has put theirs meanwhile."""
    moved = []
    for name, rows in TABLE.items():
        for owner_name, attribute, _ in rows:
            key = (f"{name}.{owner_name}" if owner_name else name, attribute)
            if key not in REPLACED:
                continue
            old, new = REPLACED.pop(key)
            owner = getattr(sys.modules[name], owner_name) if owner_name else sys.modules[name]
            if _inside(getattr(owner, attribute)) is new:
                _put(owner, attribute, old)
            if not owner_name:
                moved.append((new, old))
    _everywhere(moved)


def _everywhere(moved: list[tuple[Any, Any]]) -> None:
    """Replace functions, given as (old, new), in all modules that imported them by name."""
    others = {id(old): new for old, new in moved}
    for module in list(sys.modules.values()) if moved else []:
        if isinstance(module, ModuleType) and not module.__name__.startswith(_OURS):
            for attribute, value in list(vars(module).items()):
                if id(value) in others:
                    setattr(module, attribute, others[id(value)])

"""nnU-Net plugins of monai-memeff: trainers by name, and lean prediction; imported only when used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# trainer name (nnU-Net's -tr) -> the module that holds it; a new trainer is one row
TRAINERS = {
    "CLSTMTrainer": "nnunet_plugins.clstm_trainer",
    "HaloTrainer": "nnunet_plugins.halo_trainer",
    "OccupancyTrainer": "nnunet_plugins.occupancy_trainer",
    "SparseTrainer": "nnunet_plugins.sparse_trainer",
}

# anything else that is handed out by name -> its module
OTHERS = {"lean_prediction": "nnunet_plugins.lean.switch"}

__all__ = ["TRAINERS", "lean_prediction", *TRAINERS]


def __getattr__(name: str) -> Any:
    """Import the module of a trainer, or of lean prediction, on first use.

    Raises:
        ImportError: in one line, when nnunetv2 or something else that the trainer needs is missing.
        AttributeError: for a name that is not a trainer.
    """
    if name in OTHERS:
        return getattr(import_module(OTHERS[name]), name)
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its trainers are {', '.join(TRAINERS)}")
    try:
        trainer = getattr(import_module(TRAINERS[name]), name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be loaded: {error}; `python -m nnunet_plugins doctor` says more") from error
    globals()[name] = trainer
    return trainer


def __dir__() -> list[str]:
    """Name the trainers too, so that completion shows them before they are loaded."""
    return sorted({*globals(), *OTHERS, *TRAINERS})

"""The completion model that ships with the skull bundle: found at run time, and used on the grid it was trained on."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_memeff.bundles import bundle_path
from monai_memeff.errors import InputError

WEIGHTS, GRID = "model.pt", "model.json"


@dataclass(frozen=True)
class ModelGrid:
    """The grid that a model was trained on.

    Attributes:
        grid: edge in cells.
        cell_mm: edge of a cell in millimeters.
        headroom_mm: millimeters of air above the vertex.
        pool: voxels of the finer grid along a cell, which is thresholded before.
    """

    grid: int
    cell_mm: float
    headroom_mm: float = 24.0
    pool: int = 2


@dataclass(frozen=True)
class ShippedModel:
    """Weights of :class:`~monai_memeff.sparse.SparseCompletionNet`, and the grid they are for.

    Attributes:
        weights: state dict.
        grid: the grid; None where nothing beside the weights says it, and then they are not used.
    """

    weights: Mapping[str, Tensor]
    grid: ModelGrid | None


def shipped_model(folder: Path | None = None) -> ShippedModel | None:
    """The model in ``models/model.pt`` of the bundle ``skull_completion_sparse``; None where it has none.

    The grid is read from ``models/model.json`` (``{"settings": {"grid": 64, "cell_mm": 4.0, ...}}``, or flat) or from
    the same keys beside ``"model"`` in the weights' file. Nothing is guessed.

    Args:
        folder: folder of the weights; None: the bundle's.

    Raises:
        InputError: a file that is damaged, or whose numbers make no grid.
    """
    folder = bundle_path("skull_completion_sparse") / "models" if folder is None else folder
    file = folder / WEIGHTS
    if not file.is_file():
        return None
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise InputError(f"cannot read the shipped model {file}: {str(error).splitlines()[0]}") from error
    weights = content.get("model", content)
    said = content if content is not weights else {}
    if (folder / GRID).is_file():
        said = _read_json(folder / GRID)
        said = said.get("settings", said)  # as `WeightsRecord` writes it
    return ShippedModel(weights, _grid(said, file))


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} must hold one JSON object, got {type(found).__name__}")
    return found


def _grid(said: Mapping[str, Any], file: Path) -> ModelGrid | None:
    if "grid" not in said or "cell_mm" not in said:
        return None
    kinds = {"grid": int, "cell_mm": float, "headroom_mm": float, "pool": int}
    try:
        numbers = {name: kind(said[name]) for name, kind in kinds.items() if name in said}
    except (TypeError, ValueError) as error:
        raise InputError(f"the grid of the shipped model {file} is no number: {error}") from error
    if min(numbers.values()) <= 0:
        raise InputError(f"the grid of the shipped model {file} must be of positive numbers, got {numbers}")
    return ModelGrid(**numbers)

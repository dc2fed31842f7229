"""The completion model that ships with the skull bundle: found at run time, and used on the grid it was trained on."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_memeff.bundles import bundle_path
from monai_memeff.bundles.record import recorded_settings
from monai_memeff.errors import InputError
from monai_memeff.sparse import SparseCompletionNet


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
        grid: the grid.
    """

    weights: Mapping[str, Tensor]
    grid: ModelGrid


def shipped_model(folder: Path | None = None) -> ShippedModel | None:
    """The model in ``models/model.pt`` of the bundle ``skull_completion_sparse``; None where it has none.

    The grid is that of its record (:class:`~monai_memeff.bundles.WeightsRecord`, ``model.json``). Nothing is guessed:
    weights without a record, or with the record of other weights, are not used.

    Args:
        folder: folder of the weights; None: the bundle's.

    Raises:
        InputError: a file that is damaged, weights of another network, or a record whose numbers make no grid.
    """
    folder = bundle_path("skull_completion_sparse") / "models" if folder is None else folder
    file = folder / "model.pt"
    if not file.is_file():
        return None
    weights = _read_weights(file)
    settings = recorded_settings(file)
    return None if settings is None else ShippedModel(weights, _grid(settings, file))


def _read_weights(file: Path) -> Mapping[str, Tensor]:
    try:
        weights: Any = torch.load(file, map_location="cpu", weights_only=True)
        SparseCompletionNet().load_state_dict(weights)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"cannot read the shipped model {file}: {line:.200}; bring the file that shipped") from error
    return dict(weights)


def _grid(said: Mapping[str, Any], file: Path) -> ModelGrid:
    kinds = {"grid": (int,), "cell_mm": (int, float), "headroom_mm": (int, float), "pool": (int,)}
    numbers = {name: said.get(name) for name in kinds}
    if not all(type(n) in kinds[name] and 0 < n < math.inf for name, n in numbers.items()):  # type: ignore[operator]
        raise InputError(
            f"the record of the shipped model {file} must give grid and pool as whole numbers, cell_mm and headroom_mm"
            f" as numbers, all above 0, got {numbers}: bring the file that shipped"
        )
    return ModelGrid(**numbers)  # type: ignore[arg-type]

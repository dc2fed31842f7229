"""Files of a trained nnU-Net model: a fold's weights without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_memeff.errors import InputError

CHECKPOINT = "checkpoint_final.pth"


def find_checkpoint(folder: Path, fold: str | None) -> tuple[Path, int]:
    """The file of the fold's weights, of the first fold where none is given, and the number of other folds.

    Raises:
        InputError: there is no such file.
    """
    found = sorted(folder.glob(f"fold_*/{CHECKPOINT}"))
    if not found:
        raise InputError(f"{folder} has no fold_*/{CHECKPOINT}: train the model to its end")
    chosen = [file for file in found if fold is None or file.parent.name == f"fold_{fold}"]
    if not chosen:
        names = ", ".join(file.parent.name.removeprefix("fold_") for file in found)
        raise InputError(f"{folder} has no fold {fold}: it has {names}")
    return chosen[0], len(found) - 1


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint without running code of the file; nnU-Net's log holds numbers of numpy, which are let in.

    Raises:
        InputError: it is none of nnU-Net, or holds something else than tensors and numbers.
    """
    numbers = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "b1")}]
    scalar = getattr(np, "_core", getattr(np, "core", None)).multiarray.scalar  # type: ignore[union-attr]
    allowed: list[Any] = [*numbers, scalar, (scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and torch's own
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise InputError(f"{file} is not a checkpoint of tensors and numbers alone: {reason}") from error
    missing = {"network_weights", "init_args", "trainer_name"} - set(found if isinstance(found, dict) else ())
    if missing:
        raise InputError(f"{file} is not a checkpoint of nnU-Net: it lacks {', '.join(sorted(missing))}")
    return dict(found)

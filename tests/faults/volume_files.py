"""What the tests of files share: a small volume, an affine, and the names in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

AFFINE = np.array([[-1.0, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])


def values(dtype: Any = np.int16, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())

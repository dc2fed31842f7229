"""One place that knows what a volume's millimeters mean: MONAI's ``meta["space"]``, and NRRD's names for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_memeff.geometry.grid import check_affine

TO_RAS = {"RAS": (1.0, 1.0, 1.0), "LPS": (-1.0, -1.0, 1.0), "LAS": (-1.0, 1.0, 1.0)}
"""Signs that turn millimeters of a space into RAS: x to the right, y to the front, z upwards."""

LONG = {
    "RIGHT-ANTERIOR-SUPERIOR": "RAS",
    "LEFT-POSTERIOR-SUPERIOR": "LPS",
    "LEFT-ANTERIOR-SUPERIOR": "LAS",
}
"""NRRD's long names."""


def space_of(volume: Any, item: int = 0) -> str:
    """The space of a volume's millimeters: "RAS", "LPS" or "LAS"; "RAS", MONAI's default, where nothing is said.

    Args:
        volume: a MetaTensor, or anything; what has no ``meta`` is in RAS.
        item: Item of a batch whose spaces are a list.

    Raises:
        ValueError: another space.

    Examples:
        >>> space_of(torch.zeros(1, 2, 2, 2))
        'RAS'
    """
    found = (getattr(volume, "meta", None) or {}).get("space", "RAS")
    if isinstance(found, list | tuple) and found:
        found = found[item if len(found) > item else 0]
    name = str(getattr(found, "value", found)).upper()
    name = LONG.get(name, name)
    if name not in TO_RAS:
        raise ValueError(
            f"the volume's millimeters are in the space {found!r}, and {', '.join(TO_RAS)} are known; convert its "
            'affine and set meta["space"].'
        )
    return name


def to_ras(affine: Tensor | np.ndarray, space: str) -> Tensor:
    """A (4, 4) affine to millimeters of ``space`` as one to RAS millimeters; it also leads back, as signs do.

    Args:
        affine: (4, 4), voxel index to millimeters.
        space: "RAS", "LPS" or "LAS".

    Returns:
        (4, 4) float64.

    Raises:
        ValueError: another space, or no affine of a volume.

    Examples:
        >>> to_ras(torch.eye(4), "LPS").diag()
        tensor([-1., -1.,  1.,  1.], dtype=torch.float64)
    """
    matrix = check_affine(affine)
    if space not in TO_RAS:
        raise ValueError(f"space must be one of {', '.join(TO_RAS)}, got {space!r}.")
    signs = torch.tensor((*TO_RAS[space], 1.0), dtype=matrix.dtype, device=matrix.device)
    return signs[:, None] * matrix


def ras_affine(volume: Any, item: int = 0) -> Tensor:
    """The affine of a volume to RAS millimeters, (4, 4) float64, whatever space the volume's own affine leads to.

    Everything that goes to millimeters goes through here: meshes, points, implants, grids laid over each other.

    Args:
        volume: a MetaTensor; its affine is (4, 4), or (B, 4, 4) in a batch.
        item: Item of the batch.

    Raises:
        ValueError: there is no affine, it spans no space, or the volume names an unknown space.

    Examples:
        >>> from monai.data import MetaTensor
        >>> ras_affine(MetaTensor(torch.zeros(1, 2, 2, 2), affine=torch.eye(4), meta={"space": "LPS"})).diag()
        tensor([-1., -1.,  1.,  1.], dtype=torch.float64)
    """
    affine = getattr(volume, "affine", None)
    if affine is None:
        raise ValueError("a plain tensor has no affine: give a MetaTensor, or the affine (4, 4) to RAS millimeters.")
    if affine.ndim == 3:
        affine = affine[item if len(affine) > item else 0]
    return to_ras(affine, space_of(volume, item))

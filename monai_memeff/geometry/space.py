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
        found = _of_item("spaces", found, item)
    name = str(getattr(found, "value", found)).upper()
    name = LONG.get(name, name)
    if name not in TO_RAS:
        raise ValueError(
            f"the volume's millimeters are in the space {found!r}, and {', '.join(TO_RAS)} are known; convert its "
            'affine and set meta["space"].'
        )
    return name


def given_affine(volume: Any, affine: Tensor | np.ndarray) -> Tensor:
    """The affine that a caller says to lead to RAS millimeters, (4, 4) float64.

    Raises:
        ValueError: it is none of a volume, or it is the volume's own and the volume says that it leads to another
            space; what is written with it would be mirrored.

    Examples:
        >>> given_affine(torch.zeros(1, 2, 2, 2), torch.eye(4)).dtype
        torch.float64
    """
    matrix, own = check_affine(affine), getattr(volume, "affine", None)
    if own is not None and space_of(volume) != "RAS":
        theirs = torch.as_tensor(own).detach().as_subclass(Tensor).to(matrix).reshape(-1, *own.shape[-2:])[0]
        if theirs.shape == matrix.shape and torch.allclose(theirs, matrix, atol=1e-4):
            raise ValueError(
                f"the affine given is the volume's own, which leads to {space_of(volume)} and not to RAS: give "
                "ras_affine(volume) of monai_memeff.geometry."
            )
    return matrix


def _of_item(what: str, found: Any, item: int) -> Any:
    """What a batch says of one item; one for all, or one each."""
    if len(found) > 1 and item >= len(found):
        raise ValueError(f"the batch has {len(found)} {what}, and that of item {item} is needed; give one for each.")
    return found[item if len(found) > item else 0]


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
        affine = _of_item("affines", affine, item)
    return to_ras(affine, space_of(volume, item))

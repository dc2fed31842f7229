"""The image whose active voxels are counted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from monai_memeff.errors import InputError


def active_image(file: Path, shape: tuple[int, ...], threshold: float | None) -> tuple[Tensor, float]:
    """A volume (1, 1, H, W, D) of the input's extents that is not 0 where the image is active, and the active share.

    An image of other extents is sampled at the nearest voxels: what counts is how much is active, and where.

    Args:
        file: NIfTI, NRRD or a DICOM folder.
        shape: Shape of the input.
        threshold: voxels above it are active; None: those that are not 0.

    Raises:
        InputError: it cannot be read, or has negative values and no threshold.
    """
    from monai_memeff.data import read_volume

    values = read_volume(file).image.as_subclass(Tensor).float()
    if threshold is None and bool((values < 0).any()):
        raise InputError(
            f"{file} has values from {float(values.min()):g} on, so 0 is not background: say with --threshold "
            "from which value on voxels are active"
        )
    active = (values != 0 if threshold is None else values > threshold).float().reshape(1, 1, *values.shape[-3:])
    if len(shape) != 5:
        raise InputError(f"--image is a volume, and --shape {shape} is none")
    fitted = torch.nn.functional.interpolate(active, shape[2:], mode="nearest")
    return fitted, float(active.mean())

"""Reading a CT and refusing what the job cannot use, in one line: the limit, the value and the way out."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor

from monai_memeff.data.volume import read_volume
from monai_memeff.errors import InputError

STRIDE = 64  # the completion network halves the grid six times
MAX_SPACING_MM = 8.0
FULL = 0.5  # less than this share of the voxels may be bone
BONE_HU = 300.0
AIR_HU, AIR_SHARE = -200.0, 0.005


def check_size(size: int) -> int:
    """Refuse a grid edge that the network cannot use.

    Args:
        size: edge of the grid in cells.

    Returns:
        The same number.

    Raises:
        InputError: when it is below 64, above 512 or not a multiple of 16.
    """
    if size < STRIDE or size > 512 or size % 16:
        raise InputError(
            f"size must be a multiple of 16 from {STRIDE} (the network's stride) to 512, got {size}: try 64"
        )
    return size


@contextlib.contextmanager
def silent_readers() -> Iterator[None]:
    """Hold back what image readers print: one failure is reported once, in our own words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            _libraries_silent(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _libraries_silent() -> Iterator[None]:
    """Hold back what compiled readers write past Python."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_ct(path: str | Path, series: str | None = None, resample: bool = False) -> MetaTensor:
    """Read one CT (:func:`monai_memeff.data.read_volume`).

    Args:
        path: a NIfTI file, an NRRD or MetaImage file (with SimpleITK installed), or a DICOM folder (with pydicom
            installed).
        series: ``SeriesInstanceUID``, where the folder holds several series.
        resample: interpolate slices that are uneven or tilted onto an even grid.

    Returns:
        float32 (1, H, W, D) in Hounsfield units, with the affine in RAS+ millimeters; ``meta["notes"]`` says what was
        left out or interpolated.

    Raises:
        InputError: when the file is missing, empty, unreadable or truncated, or is not one regular 3D CT.
    """
    with silent_readers():
        image, notes = read_volume(Path(path), series, resample, modality="CT")
    image.meta["notes"] = notes
    return check_ct(image, str(path))


def check_ct(image: MetaTensor, name: str = "the image") -> MetaTensor:
    """Refuse what cannot be a head CT before any work starts.

    Args:
        image: (1, H, W, D) with an affine in RAS+ millimeters.
        name: how to call it in the message.

    Returns:
        The same image.

    Raises:
        InputError: on 2D, 4D or multi-channel images, fewer than 64 voxels along an axis, NaN or infinity, a singular
            affine, or a spacing above 8 mm.
    """
    if image.ndim != 4:
        raise InputError(f"{name} is {image.ndim - 1}D, and one 3D volume is needed: give a whole series, not a slice")
    if image.shape[0] != 1:
        raise InputError(
            f"{name} holds {image.shape[0]} volumes, and one is needed: split the 4D image and give one part"
        )
    shape = tuple(int(n) for n in image.shape[1:])
    if min(shape) < STRIDE:
        raise InputError(
            f"{name} has {' x '.join(map(str, shape))} voxels, and at least {STRIDE} along every axis are needed"
            " (the network's stride): give a finer or larger image"
        )
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise InputError(
            f"{name} holds {bad} voxels that are NaN or infinite, and none may be: replace them by -1024 (air)"
        )
    _check_affine(np.asarray(image.affine, dtype=np.float64), name)
    return image


def _check_affine(affine: np.ndarray, name: str) -> None:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or spacing.min() < 1e-3 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.1:
        raise InputError(
            f"{name} has a singular affine (spacing {millimeters(spacing)}): repair its header (qform and sform)"
        )
    if spacing.max() > MAX_SPACING_MM:
        raise InputError(
            f"{name} has a spacing of {millimeters(spacing)}, and at most {MAX_SPACING_MM:g} mm can show a skull:"
            " give a series with thinner slices, or repair the header"
        )


def millimeters(spacing: np.ndarray) -> str:
    return " x ".join(f"{s:.4g}" for s in spacing) + " mm"


def is_ct(image: torch.Tensor) -> bool:
    """Whether the values are Hounsfield units: one voxel in 200 or more lies below -200, where air and lungs are."""
    return float((image < AIR_HU).float().mean()) > AIR_SHARE


def check_units(image: torch.Tensor, name: str) -> None:
    """Refuse an image whose values are not Hounsfield units (:func:`is_ct`), where the threshold of bone is in them."""
    if not is_ct(image):
        raise InputError(
            f"{name} is no CT in Hounsfield units: in one, at least {AIR_SHARE:.1%} of the voxels are air, below"
            f" {AIR_HU:g}; give a CT, or say with --threshold above which value bone lies"
        )


def check_bone(image: np.ndarray, threshold: float, name: str = "the image") -> np.ndarray:
    """Threshold bone, and refuse an image in which that finds nothing or nearly everything.

    Args:
        image: (H, W, D) in Hounsfield units.
        threshold: voxels above it count.
        name: how to call it in the message.

    Returns:
        bool (H, W, D).

    Raises:
        InputError: when no voxel, or half of all voxels or more, lie above the threshold.
    """
    dense = image > threshold
    share = float(dense.mean())
    if share == 0:
        raise InputError(
            f"{name} has no bone: no voxel above {threshold:g} HU (largest value {float(image.max()):g});"
            " give a CT in Hounsfield units, or lower --threshold"
        )
    if share >= FULL:
        raise InputError(
            f"{name} is full: {share:.0%} of its voxels lie above {threshold:g} HU, and less than {FULL:.0%} may;"
            " give a CT in Hounsfield units, or raise --threshold"
        )
    return dense

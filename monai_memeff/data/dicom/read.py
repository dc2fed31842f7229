"""A DICOM series as one volume with its affine, and what a report should say about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monai_memeff.data.dicom.pixels import check_pixel_rules, slices
from monai_memeff.data.dicom.resample import resampled
from monai_memeff.data.dicom.scan import choose_series
from monai_memeff.data.dicom.stack import WAY_OUT, stack_of, widest_gap
from monai_memeff.errors import InputError


def read_dicom(
    path: Path, series: str | None = None, resample: bool = False, modality: str | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read one series as a volume; :func:`monai_memeff.data.read_volume`, for users, brings it to RAS millimeters.

    Slices are sorted by their positions along their normal, each is rescaled by its own slope and intercept. Several
    series, other sizes or orientations among the slices, missing, doubled or uneven slices, a tilted gantry and what
    else makes a stack irregular are refused.

    Args:
        path: a folder, searched with the folders in it, or a multi-frame file.
        series: ``SeriesInstanceUID``, where there are several.
        resample: bring unevenly spaced, shifted or tilted slices onto an even, upright grid by linear interpolation;
            a regular stack stays as it is.
        modality: what the series must be, for example "CT".

    Returns:
        float32 (columns, rows, slices), the float64 (4, 4) affine to millimeters (LPS), and notes for a report.

    Raises:
        InputError: in one line that names the files.
    """
    found = choose_series(path, series)
    if modality is not None and found.modality != modality:
        raise InputError(f"cannot read {path}: it is {found.modality}, and {modality} is needed.")
    check_pixel_rules(found, hounsfield=modality == "CT")
    stack, notes = stack_of(found.frames), found.notes
    if not stack.fault:
        first = stack.frames[0]
        values = np.empty((first.size[1], first.size[0], len(stack.frames)), dtype=np.float32)
        for k, plane in enumerate(slices(stack.frames, notes)):
            values[..., k] = plane.T
        affine = np.eye(4)
        affine[:3, :2] = (first.axes * np.array(first.spacing)[::-1, None]).T
        affine[:3, 2], affine[:3, 3] = stack.step, first.position
        return values, affine, notes
    if not resample:
        raise InputError(f"{path.name} is not one regular stack: {stack.fault}; {WAY_OUT}.")
    gap = widest_gap(stack)
    if gap:
        raise InputError(f"{path.name} has a gap too wide to interpolate: {gap}, {stack.usual:.4g} mm is usual.")
    values, affine = resampled(stack, slices(stack.frames, notes))
    notes.append(f"{stack.fault}: interpolated on an even grid of {values.shape[2]} planes, {stack.usual:.4g} mm apart")
    return values, affine, notes

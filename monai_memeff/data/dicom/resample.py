"""Slices that are not a regular stack on an even, upright grid, by linear interpolation between neighbors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from monai_memeff.data.dicom.stack import Stack


def resampled(stack: Stack, planes: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate a stack at its usual step, along the normal of its slices.

    A grid plane at the height of a slice holds that slice's own values where the slice is not shifted sideways. Beyond
    the outlines of shifted or tilted slices stands the smallest value of the images.

    Args:
        stack: slices in order; no gap is wider than it may be.
        planes: their values, float32 (rows, columns), in the same order.

    Returns:
        float32 (columns, rows, planes) and the float64 (4, 4) affine to millimeters (LPS).
    """
    frames, spacing = stack.frames, np.array(stack.frames[0].spacing)[::-1]  # along a row, down a column
    moved = np.array([frame.axes @ (frame.position - frames[0].position) for frame in frames]) / spacing
    moved[np.abs(moved) < 1e-3] = 0
    low, high = np.floor(moved.min(axis=0)).astype(int), np.ceil(moved.max(axis=0)).astype(int)
    rows, columns = frames[0].size
    count = int(np.floor((stack.heights[-1] - stack.heights[0]) / stack.usual + 1e-6)) + 1
    shape = (columns + high[0] - low[0], rows + high[1] - low[1])
    values = np.full((*shape, count), np.nan, dtype=np.float32)
    wanted = stack.heights[0] + np.arange(count) * stack.usual
    wanted[-1] = min(wanted[-1], stack.heights[-1])
    before: np.ndarray | None = None
    for k, plane in enumerate(planes):
        here = _placed(plane.T, moved[k] - low, shape)
        if before is not None:
            for z in np.flatnonzero((wanted >= stack.heights[k - 1]) & (wanted <= stack.heights[k])):
                share = (wanted[z] - stack.heights[k - 1]) / (stack.heights[k] - stack.heights[k - 1])
                values[..., z] = before if share == 0 else here if share == 1 else (1 - share) * before + share * here
        before = here
    values[np.isnan(values)] = np.nanmin(values)
    affine = np.eye(4)
    affine[:3, :2] = (frames[0].axes * spacing[:, None]).T
    affine[:3, 2] = stack.normal * stack.usual
    affine[:3, 3] = frames[0].position + affine[:3, :2] @ low
    return values, affine


def _placed(plane: np.ndarray, offset: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A plane on a larger canvas, its first pixel at ``offset``; NaN where it does not reach."""
    whole = np.floor(offset + 1e-3).astype(int)
    for axis, part in enumerate(offset - whole):
        if part > 1e-3:
            padded = np.pad(plane, [(int(axis == 0),) * 2, (int(axis == 1),) * 2], constant_values=np.nan)
            lower, upper = (padded.take(range(i, padded.shape[axis] - 1 + i), axis) for i in (0, 1))
            plane = ((1 - part) * upper + part * lower).astype(np.float32)
    canvas = np.full(shape, np.nan, dtype=np.float32)
    canvas[whole[0] : whole[0] + plane.shape[0], whole[1] : whole[1] + plane.shape[1]] = plane
    return canvas

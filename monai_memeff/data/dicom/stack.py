"""Whether slices are one regular stack: alike, in order, evenly spaced, upright; what is not is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_memeff.data.dicom.frames import ONE_RUN, ONE_VALUE, Frame, listed
from monai_memeff.errors import InputError

STEP_TOLERANCE = 0.01
"""Largest deviation of a slice from its place, as a fraction of the step between slices, ..."""

STEP_TOLERANCE_MM = 0.01
"""... and in millimeters, as positions are rounded."""

SAME_MM = 1e-3
"""Slices nearer than this lie at the same position."""

TILT = 1e-3
"""Largest sine of the angle between the stack and its slices' normal; 0.06 degrees."""

WIDEST_GAP = 3.0
"""In steps; nothing is interpolated across more."""

WAY_OUT = "export the series again, or interpolate (resample=True, --resample)"


@dataclass(frozen=True)
class Stack:
    """Slices in order along their normal.

    Attributes:
        frames: Frames from the lowest to the highest along ``normal``.
        normal: float64 (3,), LPS.
        heights: float64 (N,), millimeters along the normal.
        step: float64 (3,), LPS, mean step from slice to slice.
        usual: median distance of slices along the normal.
        fault: why it is not a regular stack; empty when it is one.
    """

    frames: list[Frame]
    normal: np.ndarray
    heights: np.ndarray
    step: np.ndarray
    usual: float
    fault: str = ""


def stack_of(frames: Sequence[Frame]) -> Stack:
    """Sort slices, and refuse those that no interpolation could mend.

    Raises:
        InputError: slices of different size, orientation, spacing or rescaling rules, several at one position, an order
            that contradicts their numbers.
    """
    _check_alike(frames)
    normal = np.cross(*frames[0].axes)
    heights = np.array([frame.position @ normal for frame in frames])
    order = np.argsort(heights, kind="stable")
    frames, heights = [frames[i] for i in order], heights[order]
    _check_positions(frames, heights)
    _check_one_value(frames)
    _check_runs(frames)
    _check_order(frames)
    step = (frames[-1].position - frames[0].position) / (len(frames) - 1)
    found = Stack(frames, normal, heights, step, float(np.median(np.diff(heights))))
    return Stack(frames, normal, heights, step, found.usual, _fault(found))


def _check_alike(frames: Sequence[Frame]) -> None:
    rules: tuple[tuple[str, Callable[[Frame], Any], float], ...] = (
        ("another size", lambda frame: frame.size, 0.0),
        ("another orientation", lambda frame: frame.axes, 1e-4),
        ("another pixel spacing", lambda frame: frame.spacing, 1e-4),
        ("another rule of rescaling", lambda frame: frame.rescale is None, 0.0),
    )
    for what, value, tolerance in rules:
        values = [np.asarray(value(frame), dtype=float) for frame in frames]
        usual = np.array(Counter(tuple(v.round(4).ravel()) for v in values).most_common(1)[0][0]).reshape(
            values[0].shape
        )
        odd = [f for f, v in zip(frames, values, strict=True) if np.abs(v - usual).max(initial=0) > tolerance]
        if odd:
            raise InputError(
                f"{len(odd)} of {len(frames)} slices have {what} than the others: {listed(odd)}; they are not one "
                "stack, remove them or give their series apart."
            )


def _check_one_value(frames: Sequence[Frame]) -> None:
    """Slices at places of their own that still belong to several volumes: other echo, kernel, patient."""
    for keyword in ONE_VALUE:
        counts = Counter(frame.traits.get(keyword) for frame in frames)
        if len(counts) > 1:
            odd = [frame for frame in frames if frame.traits.get(keyword) != counts.most_common(1)[0][0]]
            raise InputError(
                f"{len(odd)} of {len(frames)} slices have another {keyword} than the others: {listed(odd)}; they are "
                "not one volume, give one apart."
            )


def _check_runs(frames: Sequence[Frame]) -> None:
    """Slices of two acquisitions or kinds that lie between each other: each is a volume, both together are none."""
    for keyword in ONE_RUN:
        found = [frame.traits.get(keyword) for frame in frames]
        turns = [k for k in range(1, len(found)) if found[k] != found[k - 1]]
        if len(turns) >= len(set(found)):
            k = turns[0]
            raise InputError(
                f"slices with the {keyword} {found[k - 1]} and {found[k]} lie between each other, "
                f"{frames[k - 1].name} beside {frames[k].name}: the series holds several volumes, give one apart."
            )


def _check_positions(frames: Sequence[Frame], heights: np.ndarray) -> None:
    groups = np.cumsum(np.diff(heights, prepend=heights[0] - 1) > SAME_MM)
    counts = Counter(groups.tolist())
    if max(counts.values()) == 1:
        return
    first = next(group for group, count in counts.items() if count > 1)
    together = [frame for frame, group in zip(frames, groups, strict=True) if group == first]
    keywords = [key for key in together[0].traits if len({frame.traits.get(key) for frame in together}) > 1]
    differ = f" and differ in {', '.join(keywords)}" if keywords else ""
    if len(set(counts.values())) == 1 and len(counts) > 1:
        what = f"the series holds {len(together)} volumes, not one: {listed(together)} lie at the same position{differ}"
    else:
        doubled = sum(count > 1 for count in counts.values())
        what = f"several slices lie at the same position ({doubled} times): {listed(together)}{differ}"
    raise InputError(f"{what}; give one volume, with one slice for each position.")


def _check_order(frames: Sequence[Frame]) -> None:
    """Numbers and locations rise or fall along the stack; where they turn, a part of it is upside down."""
    for keyword, place in (("InstanceNumber", 0), ("SliceLocation", 1)):
        numbers = [frame.order[place] for frame in frames]
        if any(number is None for number in numbers) or len(set(numbers)) < len(numbers):
            continue
        rises = np.diff(np.array(numbers, dtype=float)) > 0
        if rises.all() or not rises.any():
            continue
        turn = int(np.flatnonzero(rises != rises[0])[0])
        raise InputError(
            f"the positions of the slices contradict their {keyword}, which turns round at {frames[turn].name} "
            f"and {frames[turn + 1].name}: part of the stack is out of place; export the series again."
        )


def _fault(stack: Stack) -> str:
    """Why slices are not evenly spaced along one upright line; empty when they are."""
    frames, usual = stack.frames, stack.usual
    tolerance = max(STEP_TOLERANCE * usual, STEP_TOLERANCE_MM)
    steps = np.diff(stack.heights)
    gaps = np.flatnonzero(steps > 1.5 * usual)
    if len(gaps):
        missing = int(sum(round(step / usual) - 1 for step in steps[gaps]))
        places = "; ".join(f"{steps[i]:.4g} mm from {frames[i].name} to {frames[i + 1].name}" for i in gaps[:3])
        more = f" and {len(gaps) - 3} more gaps" if len(gaps) > 3 else ""
        counted = "1 slice is" if missing == 1 else f"{missing} slices are"
        return f"{counted} missing where {usual:.4g} mm is the usual step: {places}{more}"
    places = frames[0].position + np.arange(len(frames))[:, None] * stack.step
    off = np.array([frame.position for frame in frames]) - places
    worst = int(np.linalg.norm(off, axis=1).argmax())
    if np.abs(off @ stack.normal).max() > tolerance:
        i = int(np.abs(steps - usual).argmax())
        return (
            f"the slices are unevenly spaced, {steps.min():.4g} to {steps.max():.4g} mm, the oddest step "
            f"{steps[i]:.4g} mm from {frames[i].name} to {frames[i + 1].name}"
        )
    if np.linalg.norm(off[worst]) > tolerance:
        return f"slices are shifted sideways, {frames[worst].name} by {np.linalg.norm(off[worst]):.3g} mm"
    cosine = float(stack.step @ stack.normal / np.linalg.norm(stack.step))
    if np.sqrt(max(0.0, 1 - cosine**2)) > TILT:
        return (
            f"the stack is tilted against its slices by {np.degrees(np.arccos(min(1.0, cosine))):.2f} degrees (gantry)"
        )
    return ""


def widest_gap(stack: Stack) -> str:
    """The gap across which nothing may be interpolated; empty when there is none."""
    steps = np.diff(stack.heights)
    i = int(steps.argmax())
    if steps[i] <= WIDEST_GAP * stack.usual:
        return ""
    return f"{steps[i]:.4g} mm from {stack.frames[i].name} to {stack.frames[i + 1].name}"

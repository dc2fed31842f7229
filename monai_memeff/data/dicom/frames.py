"""One slice of a series as plain numbers, from a file of its own or from a frame of a multi-frame file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monai_memeff.errors import InputError

ONE_VALUE = (
    "EchoTime", "EffectiveEchoTime", "EchoNumbers", "TemporalPositionIdentifier", "TemporalPositionIndex", "KVP",
    "DiffusionBValue", "InversionTime", "ConvolutionKernel", "StackID", "PixelRepresentation", "FrameOfReferenceUID",
    "StudyInstanceUID", "PatientID",
)  # fmt: skip
"""What all slices of one volume share."""

ONE_RUN = ("AcquisitionNumber", "FrameAcquisitionNumber", "ImageType", "FrameType")
"""What may change along one volume, as from one turn of the scanner to the next, but does not come back."""

TOLD_APART_BY = (*ONE_VALUE, *ONE_RUN, "TriggerTime", "AcquisitionTime")
"""What may tell images at one position apart; named in the refusal."""

UNREADABLE = "unreadable"
"""In place of a value that cannot be converted."""

AXES_TOLERANCE = 1e-3
"""Largest deviation of the image axes from unit length and a right angle."""


@dataclass(frozen=True)
class Frame:
    """One slice.

    Attributes:
        file: where it is.
        number: index of the frame in a multi-frame file; None in a file of its own.
        position: float64 (3,), millimeters (LPS) of the center of the first pixel.
        axes: float64 (2, 3), directions (LPS) along a row and down a column.
        spacing: millimeters between rows, and between columns.
        size: rows and columns.
        rescale: slope and intercept; None where the file has none.
        unit: Unit of the rescaled values, as the file says; empty where it does not.
        order: ``InstanceNumber`` and ``SliceLocation``, each None where absent.
        traits: values that tell images at one position apart.
    """

    file: Path
    number: int | None
    position: np.ndarray
    axes: np.ndarray
    spacing: tuple[float, float]
    size: tuple[int, int]
    rescale: tuple[float, float] | None
    unit: str = ""
    order: tuple[float | None, float | None] = (None, None)
    traits: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self.file.name if self.number is None else f"frame {self.number + 1} of {self.file.name}"


def listed(frames: Sequence[Frame], limit: int = 3) -> str:
    """The names of slices, the first few of many."""
    more = f" and {len(frames) - limit} more" if len(frames) > limit else ""
    return ", ".join(frame.name for frame in frames[:limit]) + more


def frames_of(file: Path, header: Any) -> Iterator[Frame]:
    """The slices of one file.

    Args:
        file: its path, for messages.
        header: pydicom's data set, without pixels.

    Raises:
        InputError: something that places a slice in space is missing or impossible.
    """
    if "PerFrameFunctionalGroupsSequence" not in header:
        if str(_find([header], "NumberOfFrames") or 1) != "1":
            raise InputError(f"{file.name} holds several frames without positions; export it as single slices.")
        yield _frame(file, None, [header])
        return
    groups = header.PerFrameFunctionalGroupsSequence
    shared = list(header.get("SharedFunctionalGroupsSequence", []))
    if str(_find([header], "NumberOfFrames")) != str(len(groups)):
        raise InputError(f"{file.name} announces other frames than the {len(groups)} that it places.")
    for number, group in enumerate(groups):
        parts = [item for source in (group, *shared) for item in _items(source)]
        yield _frame(file, number, [*parts, header])


def _items(group: Any) -> Iterator[Any]:
    """The first item of every sequence of a functional group."""
    for element in group:
        if element.VR == "SQ" and len(element.value):
            yield element.value[0]


def _frame(file: Path, number: int | None, parts: list[Any]) -> Frame:
    name = file.name if number is None else f"frame {number + 1} of {file.name}"
    if UNREADABLE in (_find(parts, keyword) for keyword in ("NumberOfFrames", *TOLD_APART_BY)):
        raise InputError(f"{name} has a damaged header; copy the series again.")
    position = np.array(_numbers(parts, "ImagePositionPatient", 3, name))
    axes = np.array(_numbers(parts, "ImageOrientationPatient", 6, name)).reshape(2, 3)
    rows, columns = _numbers(parts, "PixelSpacing", 2, name)
    if min(rows, columns) <= 0:
        raise InputError(f"{name} has PixelSpacing {rows:g} x {columns:g} mm, and it must be positive.")
    if not np.allclose(axes @ axes.T, np.eye(2), atol=AXES_TOLERANCE):
        raise InputError(f"{name} has image axes that are not at right angles (ImageOrientationPatient).")
    size = tuple(int(number) for number in (*_numbers(parts, "Rows", 1, name), *_numbers(parts, "Columns", 1, name)))
    return Frame(
        file, number, position, axes, (rows, columns), (size[0], size[1]), _rescale(parts, name),
        str(_find(parts, "RescaleType") or ""),
        (_optional(parts, "InstanceNumber") if number is None else None, _optional(parts, "SliceLocation")),
        {keyword: str(found) for keyword in TOLD_APART_BY if (found := _find(parts, keyword)) is not None},
    )  # fmt: skip


def _rescale(parts: list[Any], name: str) -> tuple[float, float] | None:
    found = [_find(parts, keyword) for keyword in ("RescaleSlope", "RescaleIntercept")]
    if found == [None, None]:
        return None
    slope, intercept = (_numbers(parts, keyword, 1, name)[0] for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope == 0:
        raise InputError(f"{name} has RescaleSlope 0, which leaves no values.")
    return slope, intercept


def _find(parts: list[Any], keyword: str) -> Any:
    for part in parts:
        try:
            value = part.get(keyword)
        except Exception:  # pydicom converts on access, and knows many ways to fail
            return UNREADABLE
        if value is not None and str(value) != "":
            return value
    return None


def _numbers(parts: list[Any], keyword: str, count: int, name: str) -> list[float]:
    value = _find(parts, keyword)
    if value is None:
        raise InputError(f"{name} has no {keyword}, so its place or size is unknown; export the series again.")
    values = [value] if isinstance(value, int | float | str) or not hasattr(value, "__len__") else list(value)
    try:
        numbers = [float(number) for number in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise InputError(f"{name} has the {keyword} {str(value)[:60]!r}, and {count} finite numbers are needed.")
    return numbers


def _optional(parts: list[Any], keyword: str) -> float | None:
    try:
        found = float(_find(parts, keyword))
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found) else None

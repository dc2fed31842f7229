"""The values of slices: decoded by pydicom, rescaled slice by slice, and what stands for no value refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_memeff.data.dicom.frames import Frame
from monai_memeff.data.dicom.scan import Series
from monai_memeff.data.float32 import as_float32
from monai_memeff.data.nifti_checks import first_line
from monai_memeff.errors import InputError

MOST_BITS = 24
"""float32 holds every integer of this many bits."""

MOST_VOXELS = 2**31
"""Rows x columns x slices; 8 GB of float32."""


def check_pixel_rules(series: Series, hounsfield: bool) -> None:
    """Refuse pixels whose numbers are not measured values, by the headers alone.

    Args:
        series: its notes take the unit of values that are not in Hounsfield units.
        hounsfield: refuse such values.

    Raises:
        InputError: color, inverted or palette pixels, a lookup table, odd bit depths, a CT without rescaling to
            Hounsfield units, or more voxels than memory holds.
    """
    for file, header in series.headers.items():
        _check_header(file, header)
    rows, columns = series.frames[0].size
    if rows * columns * len(series.frames) > MOST_VOXELS or min(rows, columns) < 1:
        raise InputError(
            f"{series.frames[0].file.name}: {rows} x {columns} x {len(series.frames)} voxels are too many."
        )
    bare = [frame for frame in series.frames if frame.rescale is None]
    if series.modality == "CT" and bare:
        raise InputError(
            f"{bare[0].name} is CT without RescaleSlope and RescaleIntercept, so its values are not in HU."
        )
    other = [frame for frame in series.frames if series.modality == "CT" and frame.unit not in ("", "HU", "HU_MOD")]
    if other and hounsfield:
        raise InputError(f"{other[0].name} is CT in units of {other[0].unit}, and HU is needed.")
    if series.modality == "CT" and len({frame.rescale for frame in series.frames}) > 1:
        series.notes.append("the slices are rescaled by several rules, each by its own")
    if other:
        series.notes.append(f"the values are in units of {other[0].unit}, not in HU")


def _check_header(file: Path, header: Any) -> None:
    photometric = str(header.get("PhotometricInterpretation", "missing"))
    if _integer(file, header, "SamplesPerPixel", 1) != 1 or photometric != "MONOCHROME2":
        raise InputError(
            f"{file.name} has the photometric interpretation {photometric}, and MONOCHROME2 is needed; export measured "
            "values, not pictures."
        )
    if "ModalityLUTSequence" in header:
        raise InputError(f"{file.name} rescales by a lookup table (ModalityLUTSequence); export it with a slope.")
    allocated, stored = (_integer(file, header, keyword, 0) for keyword in ("BitsAllocated", "BitsStored"))
    high = _integer(file, header, "HighBit", stored - 1)
    if allocated not in (8, 16, 32) or not 1 <= stored <= min(allocated, MOST_BITS) or high != stored - 1:
        raise InputError(
            f"{file.name} stores {stored} of {allocated} bits up to bit {high}, and whole numbers of at most "
            f"{MOST_BITS} bits are needed."
        )


def _integer(file: Path, header: Any, keyword: str, default: int) -> int:
    found = header.get(keyword)
    try:
        return default if found is None or found == "" else int(found)
    except (TypeError, ValueError):
        raise InputError(f"{file.name} has a damaged {keyword}; copy the series again.") from None


def slices(frames: Sequence[Frame], notes: list[str]) -> Iterator[np.ndarray]:
    """The slices' values, float32 (rows, columns), in the given order; multi-frame files are decoded once.

    Args:
        frames: Frames in order.
        notes: takes what a report should say.

    Raises:
        InputError: a file has no pixels, too few, or such that cannot be decoded or held in float32.
    """
    held: tuple[Path, np.ndarray] | None = None
    for frame in frames:
        if held is None or held[0] != frame.file:
            held = frame.file, _decode(frame, notes)
        stored = held[1] if frame.number is None else held[1][frame.number]
        slope, intercept = frame.rescale or (1.0, 0.0)
        yield as_float32(stored.astype(np.float64) * slope + intercept, frame.name)


def _is_lossy(data: Any) -> bool:
    """Whether the file is packed in a way that never keeps every value, whatever its header says of that."""
    from pydicom import uid

    always = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless)
    return data.file_meta.get("TransferSyntaxUID") in always


def _decode(frame: Frame, notes: list[str]) -> np.ndarray:
    import pydicom

    file = frame.file
    try:
        data = pydicom.dcmread(file)
        found = "PixelData" in data
        values = data.pixel_array if found else np.empty(0)
        lossy = str(data.get("LossyImageCompression", "00")) == "01" or _is_lossy(data)
    except Exception as error:
        raise InputError(f"cannot read {file}: its pixels cannot be decoded ({first_line(error)}).") from error
    if not found:
        raise InputError(f"cannot read {file}: it has no pixel data; copy the series again.")
    shape = values.shape if frame.number is None else values.shape[1:]
    if shape != frame.size or (frame.number is not None and len(values) <= frame.number):
        raise InputError(f"cannot read {file}: its pixels are {values.shape}, and its header says {frame.size}.")
    note = "the images were compressed with loss, so their values are not exact"
    if lossy and note not in notes:
        notes.append(note)
    return values

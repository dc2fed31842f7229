"""DICOM series made for tests: a volume as slices, with whatever is to be wrong about them, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monai_memeff.data import ReadVolume, read_volume
from monai_memeff.errors import InputError

CT_IMAGE, MR_IMAGE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
COUNT = 12
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
Change = Callable[[int, Any], None]


def numbers(count: int = COUNT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 2000, (9, 7, count)).astype(np.int16)


def values(volume: ReadVolume) -> np.ndarray:
    return volume.image.as_tensor().numpy()[0]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 700
    return message


def write_series(
    folder: Path,
    volume: np.ndarray,
    spacing: Sequence[float] = (0.8, 0.7, 1.5),
    origin: Sequence[float] = (-20.0, -30.0, 40.0),
    axes: Sequence[float] = AXIAL,
    uid: str = "1.2.3.1",
    prefix: str = "IM",
    change: Change | None = None,
    positions: np.ndarray | None = None,
    keep: Sequence[int] | None = None,
) -> list[Path]:
    """Write a volume as CT slices.

    Args:
        folder: made if absent.
        volume: int16 (columns, rows, slices).
        spacing: millimeters along a row, down a column, between slices.
        origin: LPS of the first pixel of the first slice.
        axes: ``ImageOrientationPatient``.
        uid: of the series.
        prefix: of the files' names.
        change: called with the slice's number and its data set before it is written.
        positions: (N, 3) instead of an even stack.
        keep: numbers of the slices to write; default all.
    """
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(axes[:3], axes[3:])
    written = []
    for k in range(volume.shape[2]) if keep is None else keep:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT_IMAGE, f"{uid}.{k + 1}"
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        path = folder / f"{prefix}{k + 1:04}.dcm"
        data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CT_IMAGE, f"{uid}.{k + 1}"
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = uid, "1.2.3", "1.2.4"
        data.Modality, data.ImageType, data.PatientID = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], "P"
        data.InstanceNumber = k + 1
        place = np.array(origin) + k * spacing[2] * normal if positions is None else positions[k]
        data.ImagePositionPatient = [f"{number:.10g}"[:16] for number in place]
        data.ImageOrientationPatient = [f"{number:.10g}"[:16] for number in axes]
        data.PixelSpacing = [spacing[1], spacing[0]]
        data.SliceThickness = spacing[2]
        data.Columns, data.Rows = volume.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, 0, "HU"
        data.PixelData = volume[..., k].T.astype("<i2").tobytes()
        if change is not None:
            change(k, data)
        data.save_as(path, enforce_file_format=True)
        written.append(path)
    return written


def write_multiframe(path: Path, volume: np.ndarray, heights: Sequence[float], slopes: Sequence[float]) -> None:
    """Write a volume as one enhanced CT, whose frames have heights (LPS z) and slopes of their own."""
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    (first,) = write_series(path.parent, volume[..., :1], prefix="first")
    data = pydicom.dcmread(first)
    first.unlink()
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    orientation, measures, shared = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, measures.PixelSpacing = data.ImageOrientationPatient, data.PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([orientation]), Items([measures])
    groups = []
    for height, slope in zip(heights, slopes, strict=True):
        plane, values, group = Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient = [-20, -30, height]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, 0, "HU"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = Items([plane]), Items([values])
        groups.append(group)
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "InstanceNumber",
    ):
        delattr(data, keyword)
    del data.RescaleIntercept, data.RescaleType
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = Items([shared]), Items(groups)
    data.NumberOfFrames = len(groups)
    data.PixelData = volume.transpose(2, 1, 0).astype("<i2").tobytes()
    data.save_as(path, enforce_file_format=True)

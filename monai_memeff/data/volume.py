"""One door for images: whatever the format, a volume comes in exactly, or is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor

from monai_memeff.data.float32 import as_float32
from monai_memeff.data.nifti_checks import ENDINGS, check_file, first_line, geometry_notes, open_nifti
from monai_memeff.errors import InputError
from monai_memeff.geometry import to_ras

ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_ENDINGS = (".dcm", ".ima", ".dicom")


class ReadVolume(NamedTuple):
    """An image that was read.

    Attributes:
        image: float32 (1, H, W, D), with the affine to RAS millimeters.
        notes: sentences for a report: what was chosen, left out, interpolated.

    Examples:
        >>> save_nifti("head.nii.gz", torch.zeros(4, 5, 6), torch.eye(4))
        >>> read_volume("head.nii.gz").notes
        ()
    """

    image: MetaTensor
    notes: tuple[str, ...]


def read_volume(
    path: str | os.PathLike[str], series: str | None = None, resample: bool = False, modality: str | None = None
) -> ReadVolume:
    """Read one 3D image: a DICOM folder or file, NIfTI, FreeSurfer, NRRD or MetaImage.

    Args:
        path: File or folder of the image.
        series: for DICOM, the ``SeriesInstanceUID`` where a folder holds several series.
        resample: for DICOM, interpolate slices that are uneven or tilted onto an even grid.
        modality: for DICOM, what the series must be, such as "CT".

    Returns:
        The volume (1, H, W, D) with its affine to RAS millimeters, and notes for a report.

    Raises:
        InputError: the file is damaged, no single regular volume, in a format that is not read exactly, or holds
            integers that float32 lacks (beyond 2^24); or ``series`` or ``resample`` is given for a file that is not
            DICOM.

    Examples:
        >>> save_nifti("head.nii.gz", torch.zeros(4, 5, 6), torch.eye(4))
        >>> image, notes = read_volume("head.nii.gz")
        >>> image.shape
        torch.Size([1, 4, 5, 6])
    """
    path = Path(path)
    if not path.is_dir():
        check_file(path)
    name = path.name.lower()
    if path.is_dir() or name.endswith(DICOM_ENDINGS) or _has_dicom_mark(path):
        from monai_memeff.data.dicom import read_dicom

        values, affine, notes = read_dicom(path, series, resample, modality)
        space = "LPS"
    elif series is not None or resample:
        raise InputError(f"{path} is no DICOM series: leave out series (--series) and resample (--resample).")
    elif name.endswith(ITK_ENDINGS):
        from monai_memeff.data.itk_formats import read_with_itk

        values, affine, notes, space = *read_with_itk(path), "LPS"
    else:
        values, affine, notes = _read_nifti(path)
        space = "RAS"
    if values.ndim != 3:
        raise InputError(f"{path} {_what(values.shape)}")
    meta: dict[str, Any] = {"filename_or_obj": str(path), "original_channel_dim": "no_channel"}
    image = MetaTensor(torch.from_numpy(values[None]), affine=to_ras(affine, space), meta=meta)
    return ReadVolume(image, tuple(notes))


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    image = open_nifti(path)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    wide = image.get_data_dtype().itemsize > 2 or abs(image.dataobj.slope) > 1e30  # all others fit into float32
    try:
        values = np.asarray(image.dataobj, dtype=None if wide else np.float32).reshape(shape)
    except Exception as error:
        raise InputError(f"cannot read {path}: {first_line(error)}; copy the image again.") from error
    return np.ascontiguousarray(as_float32(values, path)), np.asarray(image.affine), geometry_notes(image)


def _what(shape: tuple[int, ...]) -> str:
    if len(shape) < 3:
        return f"is {len(shape)}D, and one 3D volume is needed: give a whole series, not a slice"
    return (
        f"holds {int(np.prod(shape[3:]))} volumes, and one is needed: split the {len(shape)}D image and give one part"
    )


def _has_dicom_mark(path: Path) -> bool:
    if path.name.lower().endswith((*ENDINGS, *ITK_ENDINGS)):
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"

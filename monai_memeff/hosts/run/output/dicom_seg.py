"""DICOM SEG out, by highdicom: segments with names and codes, every frame referring to the slice it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_memeff.data import atomic_write
from monai_memeff.data.dicom.scan import choose_series
from monai_memeff.data.dicom.stack import WAY_OUT, stack_of
from monai_memeff.errors import InputError
from monai_memeff.hosts.run.output.segments import Labels, described

TYPE_2 = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
"""What a SEG repeats of its source, and what may be empty there."""

REFERRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
"""What a SEG refers to, and cannot be without."""


@dataclass(frozen=True)
class Sources:
    """The images that a SEG refers to.

    Attributes:
        images: pydicom's data sets without pixels, in the order of the volume's slices; or one multi-frame image.
        frames: for a multi-frame image, its frame number (from 0) of each slice.
    """

    images: list[Any]
    frames: list[int] | None = None

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return str(self.images[0].SeriesInstanceUID)


def sources_of(path: Path, series: str | None, resample: bool = False) -> Sources:
    """The images of a series that is one regular stack.

    Raises:
        InputError: a package is missing; or the slices were to be interpolated, so no frame has a source.
    """
    try:
        import highdicom  # noqa: F401
        import pydicom
    except ImportError:
        raise InputError(
            "DICOM SEG needs highdicom: pip install 'monai-memeff[dicom]', or use --format nifti"
        ) from None
    stack = stack_of(choose_series(path, series).frames)
    if stack.fault and not resample:
        raise InputError(f"{path.name} is not one regular stack: {stack.fault}; {WAY_OUT}.")
    if stack.fault:
        raise InputError(f"no DICOM SEG refers to interpolated slices ({stack.fault}); use --format nifti")
    files = list(dict.fromkeys(frame.file for frame in stack.frames))
    images = [_completed(pydicom.dcmread(file, stop_before_pixels=True)) for file in files]
    if stack.frames[0].number is None:
        return Sources(images)
    frames = [frame.number for frame in stack.frames if frame.number is not None]
    if len(files) > 1 or sorted(frames) != list(range(int(images[0].NumberOfFrames))):
        raise InputError("a DICOM SEG refers to one whole multi-frame image; use --format nifti")
    return Sources(images, frames)


def write_seg(
    path: Path, labels: Labels, sources: Sources, name: str, version: str, parameters: dict[str, str]
) -> None:
    """Write labels as a binary DICOM SEG, all or nothing.

    Args:
        path: ends in .dcm.
        labels: (columns, rows, slices), or (S, columns, rows, slices) of overlapping segments.
        sources: images of the same slices.
        name: Name of the bundle.
        version: Version of the bundle.
        parameters: for the algorithm's identification; `software` is the version of this package.

    Raises:
        InputError: the bundle does not say what the numbers mean.
    """
    import highdicom
    from highdicom.seg import Segmentation, SegmentationTypeValues
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name[:64], codes.cid7162.ArtificialIntelligence, version[:64], "monai-memeff", parameters
    )
    segments = described(labels, algorithm)
    planes = np.moveaxis(labels.values, (-1, -2, -3), (0, 1, 2))  # slices, rows, columns, and segments last
    if sources.frames is not None:
        planes = planes[np.argsort(sources.frames)]
    segmentation = Segmentation(
        source_images=sources.images,
        pixel_array=np.ascontiguousarray(planes, dtype=np.uint8 if len(segments) < 256 else np.uint16),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="monai-memeff",
        manufacturer_model_name=name[:64],
        software_versions=parameters.get("software", "unknown"),
        device_serial_number="none",
        content_label="SEGMENTATION",
        series_description=name[:64],
    )
    if "ContentCreatorName" not in segmentation:
        segmentation.ContentCreatorName = None  # the standard wants the attribute, and readers warn without it
    with atomic_write(path) as work:
        segmentation.save_as(work)


def _completed(image: Any) -> Any:
    """With what a SEG must repeat, empty where the source lacks it; an instance's numbers stand in its file's head."""
    for keyword in TYPE_2:
        if keyword not in image:
            setattr(image, keyword, None if keyword not in ("PatientID", "StudyID", "AccessionNumber") else "")
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if not image.get(keyword):
            setattr(image, keyword, image.file_meta.get(f"MediaStorage{keyword}"))
    lacking = [keyword for keyword in REFERRED if not image.get(keyword)]
    if lacking:
        raise InputError(
            f"the series has no {' and no '.join(lacking)}, which a DICOM SEG refers to; export it again, or use"
            " --format nifti"
        )
    return image

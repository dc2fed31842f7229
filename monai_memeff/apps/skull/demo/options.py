"""What a user says to the skull demos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SkullOptions:
    """The options of both skull demos; None where the demo has its own default.

    Attributes:
        output: folder for reports, figure and implants.
        image: head CT (see :func:`monai_memeff.apps.skull.demo.io.read_ct`), or a mask of a skull (threshold 0.5).
        size: edge of the grid in voxels; None: 64.
        seconds: training time of a network, which grows with the volume.
        threshold: bone is above this value; None: 300 Hounsfield units, and an image in other units is refused.
        defects: Number of synthetic defects to test on; None: 6.
        seed: Seed of defects and weights.
        series: ``SeriesInstanceUID`` of a DICOM folder with several series.
        resample: interpolate uneven or tilted DICOM slices onto an even grid.
    """

    output: Path
    image: Path | None = None
    size: int | None = None
    seconds: float | None = None
    threshold: float | None = None
    defects: int | None = None
    seed: int = 0
    series: str | None = None
    resample: bool = False

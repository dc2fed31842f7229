"""Probabilities written as nnU-Net's npz file, class after class."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image

from nnunet_plugins.lean.export.probabilities import ProbabilityFile


class CropAndTranspose:
    """Puts the probabilities of one class into the whole image, in the order of its axes.

    Args:
        shape: Of the whole image, before nnU-Net's transpose back.
        box: Where the cropped image lies.
        axes: Of the transpose back.
        background: Whether class 0 is certain outside the box.
    """

    def __init__(self, shape: Sequence[int], box: Any, axes: Sequence[int], background: bool) -> None:
        self.shape, self.box, self.axes, self.background = tuple(shape), box, axes, background

    def __call__(self, values: np.ndarray, number: int) -> np.ndarray:
        """Values (X, Y, Z) of class ``number`` in the whole image."""
        whole = np.full(self.shape, 1 if self.background and number == 0 else 0, values.dtype)
        return insert_crop_into_image(whole, values, self.box).transpose(self.axes)


def save_probabilities_npz(name: str, file: ProbabilityFile, placement: CropAndTranspose) -> None:
    """Write what ``np.savez_compressed(name, probabilities=...)`` writes, with one class at a time in memory."""
    shape = (file.classes, *(placement.shape[axis] for axis in placement.axes))
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(int(extent) for extent in shape)}
    with (
        zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive,
        archive.open("probabilities.npy", "w", force_zip64=True) as stream,
    ):
        np.lib.format.write_array_header_1_0(stream, header)
        for number in range(file.classes):
            values = placement(file.read_class(number), number)
            stream.write(memoryview(np.ascontiguousarray(values, dtype="<f4")).cast("B"))

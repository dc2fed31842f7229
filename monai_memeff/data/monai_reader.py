"""The checked readers behind MONAI's ``LoadImage``: a pipeline reads what is exact and refuses the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data.image_reader import ImageReader
from monai.data.utils import affine_to_spacing
from monai.utils import MetaKeys, SpaceKeys

from monai_memeff.data.volume import read_volume
from monai_memeff.errors import InputError


class VolumeReader(ImageReader):
    """Read volumes for ``LoadImage`` by :func:`read_volume`; several files become channels, on one grid.

    In a bundle: ``{"_target_": "LoadImaged", "keys": "image", "reader": "monai_memeff.data.VolumeReader"}``. Notes of
    the reader are in the image's ``meta["notes"]``.

    Args:
        series: for DICOM, the ``SeriesInstanceUID``.
        resample: for DICOM, interpolate uneven or tilted slices.
        modality: for DICOM, what a series must be.

    Raises:
        InputError: in the call of ``LoadImage``: see :func:`read_volume`, and files on different grids.

    Examples:
        >>> from monai.transforms import LoadImage
        >>> save_nifti("head.nii.gz", torch.zeros(4, 5, 6), torch.eye(4))
        >>> LoadImage(reader=VolumeReader(), ensure_channel_first=True)("head.nii.gz").shape
        torch.Size([1, 4, 5, 6])
    """

    def __init__(self, series: str | None = None, resample: bool = False, modality: str | None = None) -> None:
        super().__init__()
        self.series, self.resample, self.modality = series, resample, modality

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """True: what cannot be read is refused by :meth:`get_data`, not passed on to a reader that guesses."""
        return True

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[PathLike]:
        """The paths: ``LoadImage`` passes a refusal of this method on to readers that guess, so nothing is read yet."""
        return [data] if isinstance(data, str | os.PathLike) else list(data)

    def get_data(self, img: Sequence[PathLike]) -> tuple[np.ndarray, dict]:
        """The values (H, W, D), or (C, H, W, D) of several volumes, and MONAI's metadata.

        Raises:
            InputError: see :func:`read_volume`, and where several volumes have different grids.
        """
        volumes = [read_volume(path, self.series, self.resample, self.modality) for path in img]
        first = volumes[0].image
        for path, volume in zip(img, volumes, strict=True):
            same = volume.image.shape == first.shape and np.allclose(volume.image.affine, first.affine, atol=1e-3)
            if not same:
                raise InputError(f"{path} has another grid than {img[0]}; channels share one, resample it first.")
        values = [volume.image.as_tensor().numpy()[0] for volume in volumes]
        affine = np.asarray(first.affine)
        meta = {
            MetaKeys.AFFINE: affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.array(values[0].shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if len(values) == 1 else 0,
            "spacing": affine_to_spacing(affine),
            "notes": "; ".join(note for volume in volumes for note in volume.notes),
        }
        return values[0] if len(values) == 1 else np.stack(values), meta

"""Slabs of a volume as they lie on disk: read one at a time, checked that they continue each other, and written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.arguments import check_axis, check_count, numbers_checked
from monai_memeff.data.float32 import as_float32
from monai_memeff.data.nifti import LabelFile
from monai_memeff.data.nifti_checks import open_nifti
from monai_memeff.errors import InputError
from monai_memeff.geometry import ras_affine

TOLERANCE = 0.01
"""Largest difference of slice spacings, as a fraction, that counts as the same spacing."""


def check_that_slabs_continue(slabs: Iterable[Tensor], axis: int) -> Iterator[Tensor]:
    """Pass slabs (B, C, H, W, d) on, and compare the affines of those that have one of their own (MetaTensor).

    Slabs that MONAI cut out of a volume by ``split`` all carry the volume's affine, which says nothing.

    Args:
        slabs: Slabs in order.
        axis: the spatial axis along which they follow each other.

    Raises:
        ValueError: a slab has another in-plane size, or does not begin where the one before it ends: the slice spacing
            changes, or slices are missing or repeated.
    """
    before: np.ndarray | None = None
    expected: np.ndarray | None = None  # in RAS, so that slabs in different spaces can be compared
    plane: tuple[int, ...] | None = None
    for number, slab in enumerate(slabs):
        shape = tuple(extent for dim, extent in enumerate(slab.shape) if dim != 2 + axis)
        if plane not in (None, shape):
            raise ValueError(f"slab {number} has the in-plane shape {shape}, the ones before {plane}; resample first.")
        plane = shape
        affine = ras_affine(slab).cpu().numpy() if isinstance(slab, MetaTensor) else None
        if affine is not None and expected is not None and not np.array_equal(affine, before):
            step = np.linalg.norm(expected[:3, axis])
            moved = np.linalg.norm(affine[:3, 3] - expected[:3, 3])
            if moved > TOLERANCE * step or not np.allclose(affine[:3, :3], expected[:3, :3], atol=TOLERANCE * step):
                raise ValueError(
                    f"slab {number} does not continue the one before it: its first slice lies {moved:.3g} mm off and "
                    f"its slice spacing is {np.linalg.norm(affine[:3, axis]):.4g} mm after {step:.4g}; resample to "
                    "one spacing first."
                )
        before = affine
        expected = None if affine is None else shifted(affine, axis, slab.shape[2 + axis])
        yield slab


def affine_of(slab: Any) -> np.ndarray | None:
    """The affine of a MetaTensor, (4, 4), in its own space; of the first one in a batch."""
    if not isinstance(slab, MetaTensor):
        return None
    return slab.affine.detach().cpu().double().numpy().reshape(-1, 4, 4)[0]


def shifted(affine: np.ndarray, axis: int, slices: int) -> np.ndarray:
    """The affine of the same grid, counted from another slice on."""
    moved = affine.copy()
    moved[:3, 3] += slices * affine[:3, axis]
    return moved


class NiftiSlabs(Sequence[Tensor]):
    """A NIfTI or FreeSurfer file as a sequence of slabs (1, 1, H, W, d), each read when it is needed.

    Slabs are float32 MetaTensors with the affine of their own first slice, in RAS millimeters.
    An uncompressed file is read in place. A ``.nii.gz`` is unpacked from its beginning again for every step back, so
    for a bidirectional network unpack it first.

    Args:
        path: File of a 3D volume.
        slab: slices per slab.
        axis: spatial axis of the slices.
        transform: applied to every slab; must treat a voxel as it would in the whole volume.

    Raises:
        ValueError: slab below 1, or no such axis.
        InputError: there is no such file, it is not 3D, or is refused by :func:`monai_memeff.data.open_nifti`.

    Examples:
        >>> import tempfile
        >>> from monai_memeff.data import save_nifti
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_nifti(f"{folder}/ct.nii", torch.zeros(8, 8, 10), torch.eye(4))
        ...     [tuple(slab.shape) for slab in NiftiSlabs(f"{folder}/ct.nii", slab=6)]
        [(1, 1, 8, 8, 6), (1, 1, 8, 8, 4)]
    """

    @numbers_checked
    def __init__(
        self,
        path: str | os.PathLike[str],
        slab: int = 16,
        axis: int = 2,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_count("slab", slab)
        check_axis(axis)
        self.path = Path(path)
        self.image = open_nifti(path, keep_file_open=True)
        if len(self.image.shape) != 3:
            raise InputError(f"NiftiSlabs reads 3D volumes, {os.fspath(path)} has the shape {self.image.shape}.")
        self.slab, self.axis, self.transform = slab, axis % 3, transform

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, D) of the file."""
        return self.image.shape

    def __len__(self) -> int:
        return -(-self.image.shape[self.axis] // self.slab)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = number * self.slab
        place: list[slice] = [slice(None)] * 3
        place[self.axis] = slice(first, first + self.slab)
        values = np.ascontiguousarray(as_float32(np.asarray(self.image.dataobj[tuple(place)]), self.path))
        slab = MetaTensor(
            torch.from_numpy(values)[None, None], affine=torch.from_numpy(shifted(self.image.affine, self.axis, first))
        )
        return slab if self.transform is None else self.transform(slab)

    def create_labels(self, path: str | os.PathLike[str]) -> LabelFile:
        """Make an uncompressed NIfTI file of uint8 on the same grid, to be filled with (1, 1, H, W, D).

        The file takes its name when :meth:`SlabInferer.write` has filled it, or by ``commit()``.

        Raises:
            InputError: the name does not end in .nii, or is the image itself.
        """
        return LabelFile(path, self.shape, self.image.affine, source=self.path)

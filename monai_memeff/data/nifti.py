"""NIfTI out: whole volumes and label files filled slab by slab, atomic, with one geometry in both of its places."""

from __future__ import annotations

import gzip
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.data.atomic import atomic_write, check_other_file, temporary_beside
from monai_memeff.errors import InputError
from monai_memeff.geometry import check_affine, given_affine

NIFTI1_MAX = 32767
"""Largest extent that a NIfTI-1 header can hold."""


def save_nifti(path: str | os.PathLike[str], values: np.ndarray | Tensor, affine: np.ndarray | Tensor) -> None:
    """Write a volume as NIfTI, all or nothing.

    Args:
        path: ends in .nii or .nii.gz.
        values: (H, W, D); every number is stored exactly. Types that NIfTI lacks become wider: booleans uint8, half
            precision float32. Integers of 64 bits become int32 where that holds them.
        affine: (4, 4), voxel index -> RAS millimeters.

    Raises:
        InputError: another ending, a volume that is not 3D or empty, complex or no numbers.
        ValueError: an affine that maps to no millimeters, or the own one of a MetaTensor that leads to another space.

    Examples:
        >>> save_nifti("labels.nii.gz", torch.zeros(4, 5, 6, dtype=torch.int64), torch.eye(4))
        >>> open_nifti("labels.nii.gz").get_data_dtype().name
        'int32'
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz", ".NII", ".NII.GZ")):
        raise InputError(f"a volume is written as .nii or .nii.gz, got {path.name!r}: give such a name.")
    image = _image(_storable(values), given_affine(values, affine))
    with atomic_write(path) as work, open(work, "wb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(raw)


class LabelFile:
    """An uncompressed NIfTI file of uint8 that is filled slab by slab and takes its name when it is whole.

    It takes numpy's assignments of (1, 1, H, W, D). Until :meth:`commit` the voxels lie in a temporary file beside the
    target, and whatever stood under the target's name still does. :meth:`abort`, an exception in a ``with`` block, or
    dropping the object removes the temporary file. Numbers other than 0 ... 255 are refused.

    Args:
        path: ends in .nii.
        shape: (H, W, D).
        affine: (4, 4), voxel index -> RAS millimeters.
        source: file that the labels are computed from; it may not be ``path``.

    Raises:
        InputError: another ending, or the source itself.
        ValueError: an affine that maps to no millimeters, or a finished file is written to.

    Examples:
        >>> with LabelFile("labels.nii", (4, 5, 6), torch.eye(4)) as labels:
        ...     labels[..., :2] = 1
        >>> read_volume("labels.nii").image.sum()
        metatensor(40.)
    """

    @numbers_checked
    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        affine: np.ndarray | Tensor,
        source: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".nii", ".NII"):
            raise InputError(f"labels are written in place, so the name must end in .nii, got {self.path}.")
        check_other_file(path, *([] if source is None else [source]))
        image = _image(np.broadcast_to(np.uint8(0), tuple(shape)), affine)
        self._work = temporary_beside(Path(os.path.realpath(path)))
        self._remove = weakref.finalize(self, self._work.unlink, missing_ok=True)
        offset = int(image.header["vox_offset"]) or image.header.single_vox_offset
        with open(self._work, "wb") as file:
            image.header.write_to(file)
            file.truncate(offset + int(np.prod(shape)))
        self._voxels: np.memmap | None = np.memmap(self._work, np.uint8, "r+", offset, tuple(shape), order="F")

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, 1, H, W, D)."""
        return (1, 1, *self._open().shape)

    @property
    def dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    def __setitem__(self, place: Any, values: Any) -> None:
        self._open()[None, None][place] = _labels(values)

    def __getitem__(self, place: Any) -> np.ndarray:
        return np.array(self._open()[None, None][place])  # a copy, as the file is closed by commit()

    def commit(self) -> None:
        """Give the file its name; nothing can be written after that."""
        self._open().flush()
        self._voxels = None
        with atomic_write(self.path) as whole:
            os.replace(self._work, whole)
        self._remove.detach()

    def abort(self) -> None:
        """Remove what was written; the target stays as it was."""
        self._voxels = None
        self._remove()

    def __enter__(self) -> LabelFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._voxels is not None:
            self.abort() if kind else self.commit()

    def _open(self) -> np.memmap:
        if self._voxels is None:
            raise ValueError(f"{self.path} is finished or was given up: make a new label file.")
        return self._voxels


def _labels(values: Any) -> np.ndarray:
    """As uint8, into which numpy would press logits, too: -2 as 254."""
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    with np.errstate(invalid="ignore"):
        whole = found.dtype in (np.uint8, np.bool_) or np.array_equal(found, found.astype(np.uint8))
    if not whole:
        raise InputError(
            f"a label file takes whole numbers from 0 to 255, got {found.dtype} from {found.min():g} to "
            f"{found.max():g}; take the largest class of logits, or number the labels anew."
        )
    return found


def _storable(values: np.ndarray | Tensor) -> np.ndarray:
    """The same numbers in a type that NIfTI has."""
    if isinstance(values, Tensor):
        values = values.detach().as_subclass(Tensor).cpu()
        values = values.float() if values.is_floating_point() and values.dtype != torch.float64 else values
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(f"a volume of real numbers of up to 64 bits is written, got {array.dtype}: convert it first.")
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8 and array.size:
        small = np.iinfo(np.int32)
        return array.astype(np.int32) if small.min <= array.min() and array.max() <= small.max else array
    wider = {np.dtype(np.bool_): np.uint8, np.dtype(np.float16): np.float32}
    return array.astype(wider.get(array.dtype.newbyteorder("="), array.dtype), copy=False)


def _image(values: np.ndarray, affine: np.ndarray | Tensor) -> Any:
    """A NIfTI image whose two geometries agree; a sheared grid has no qform, which cannot hold it."""
    import nibabel

    if values.ndim != 3 or 0 in values.shape:
        raise InputError(f"a volume (H, W, D) with voxels is written, got the shape {values.shape}.")
    affine = check_affine(affine).cpu().numpy()
    kind = nibabel.Nifti1Image if max(values.shape) <= NIFTI1_MAX else nibabel.Nifti2Image
    image = kind(values, affine, dtype=values.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    image.set_qform(affine, code=int(np.allclose(axes.T @ axes, np.eye(3), atol=1e-4)))
    return image

"""NIfTI and FreeSurfer files in: opened when header, size, checksum and geometry agree, else refused in one line."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from monai_memeff.errors import InputError
from monai_memeff.geometry import check_affine

ENDINGS = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz", ".mgh", ".mgz")
BLOCK = 2**20


def open_nifti(path: str | os.PathLike[str], keep_file_open: bool = False) -> Any:
    """Open a volume with nibabel after everything that can be checked without its values was checked.

    NIfTI-1 and NIfTI-2 of either byte order, in one file or two (.hdr/.img), with header extensions, packed or not, and
    FreeSurfer's .mgh/.mgz. A packed file is unpacked once to compare its checksum.

    Args:
        path: File; of a pair either.
        keep_file_open: For a walk along the slices: a packed file is then unpacked once, not once per slab.

    Returns:
        nibabel's image; its affine leads to RAS millimeters, its voxels are still on the disk.

    Raises:
        InputError: the file is missing, damaged, of another format (Analyze 7.5 has no left and right), shorter or
            longer than its header says, of complex or color voxels, without orientation, or not in millimeters.

    Examples:
        >>> save_nifti("head.nii.gz", torch.zeros(4, 5, 6), torch.eye(4))
        >>> open_nifti("head.nii.gz").shape
        (4, 5, 6)
    """
    path = check_file(path)
    if not path.name.lower().endswith(ENDINGS):
        refuse_archive(path)
        raise InputError(f"cannot read {path}: {', '.join(ENDINGS)} are NIfTI or FreeSurfer files; convert it.")
    import nibabel

    try:
        image: Any = nibabel.load(path, keep_file_open=keep_file_open)
        known = isinstance(image, nibabel.Nifti1Pair | nibabel.MGHImage)
        kind = image.get_data_dtype().kind
        with image.file_map["header" if "header" in image.file_map else "image"].get_prepare_fileobj("rb") as file:
            header = np.frombuffer(file.read(image.header.template_dtype.itemsize), image.header.structarr.dtype)[0]
    except Exception as error:
        raise InputError(f"cannot read {path}: {first_line(error)}; check that it is a whole NIfTI image.") from error
    if not known:
        raise InputError(
            f"cannot read {path}: {type(image).__name__} is an older format that does not say left from right; convert "
            "it to NIfTI with its orientation."
        )
    if kind not in "iuf":
        raise InputError(f"cannot read {path}: its voxels are {image.get_data_dtype()}, and real numbers are needed.")
    _check_stored(header, image.get_data_dtype().itemsize, path)
    _check_size(image, path)
    _check_geometry(image, path)
    return image


def check_file(path: str | os.PathLike[str]) -> Path:
    """Refuse anything but a file with content.

    Raises:
        InputError: it is missing, no regular file, or empty.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such image: {path}: give a NIfTI, NRRD or MetaImage file, or a DICOM folder")
    if not path.is_file():
        raise InputError(f"cannot read {path}: it is not a regular file; give an image file or a DICOM folder.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: copy the image again, or give another one")
    return path


def refuse_archive(path: Path) -> None:
    """Say of a packed file by its first bytes that it is one, as a PACS or a portal gives a study.

    Raises:
        InputError: it is packed by zip, gzip, 7z, RAR, bzip2 or xz.
    """
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith((b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ")):
        raise InputError(f"cannot read {path}: it is a packed file; unpack it, and give the folder with its images.")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type."""
    return next((line.strip()[:160] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def geometry_notes(image: Any) -> list[str]:
    """What a report says about a NIfTI whose two geometries differ though both may be right."""
    both, notes = _two_geometries(image), []
    if both is not None and not np.allclose(*both, atol=1e-2):
        notes.append("the header has two geometries that differ (qform and sform); the sform was used")
    if "pixdim" in image.header:
        stored, used = image.header["pixdim"][1:4], np.linalg.norm(image.affine[:3, :3], axis=0)
        if not np.allclose(stored, used, rtol=1e-2):
            notes.append("the header's pixdim differs from the lengths of its affine; the affine was used")
    return notes


def _check_stored(header: Any, itemsize: int, path: Path) -> None:
    """Look at what the file itself says, where nibabel mends it without a word."""
    scaling = [float(header[name]) for name in ("scl_slope", "scl_inter") if name in header.dtype.names]
    if np.isinf(scaling).any():  # NaN is nibabel's word for none
        raise InputError(f"cannot read {path}: its scaling (slope, intercept) is {scaling}; repair its header.")
    if "pixdim" in header.dtype.names and header["sform_code"] <= 0 and (header["pixdim"][1:4] <= 0).any():
        raise InputError(
            f"cannot read {path}: its pixdim is {header['pixdim'][1:4].tolist()} and readers disagree on what that "
            "means; set positive millimeters."
        )
    bits = int(header["bitpix"]) if "bitpix" in header.dtype.names else None
    if bits is not None and bits != 8 * itemsize:
        raise InputError(f"cannot read {path}: bitpix is {bits} for voxels of {8 * itemsize} bits; repair its header.")
    if "goodRASFlag" in header.dtype.names and int(header["goodRASFlag"]) != 1:
        raise InputError(f"cannot read {path}: it stores no orientation (goodRASFlag is not 1); set its geometry.")


def _check_size(image: Any, path: Path) -> None:
    """Compare the bytes that the header announces with those that are there."""
    shape = image.shape
    if not shape or min(shape) < 1:
        raise InputError(f"cannot read {path}: its header says {shape} voxels; repair it.")
    source = Path(image.file_map["image"].filename)
    needed = int(image.dataobj.offset) + int(np.prod(shape, dtype=object)) * image.get_data_dtype().itemsize
    try:
        with open(source, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        found = _unpacked_size(source) if packed else source.stat().st_size
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {source}: it is damaged ({first_line(error)}); copy the image again.") from error
    if found < needed:
        raise InputError(
            f"cannot read {source}: it is truncated, {found} bytes of the {needed} that its header announces "
            f"({' x '.join(map(str, shape))} voxels); copy the image again."
        )
    if found > needed and image.header.get("sizeof_hdr", None) is not None:
        raise InputError(
            f"cannot read {source}: {found - needed} bytes are left over after the {' x '.join(map(str, shape))} voxels"
            " that its header announces; repair its header."
        )


def _unpacked_size(path: Path) -> int:
    """Bytes of a packed file; reading it to its end makes gzip compare the checksum."""
    size = 0
    with gzip.open(path) as file:
        while block := file.read(BLOCK):
            size += len(block)
    return size


def _check_geometry(image: Any, path: Path) -> None:
    try:
        check_affine(image.affine)
    except ValueError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    header = image.header
    if "qform_code" not in header:
        return
    if int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0:
        raise InputError(
            f"cannot read {path}: it stores no orientation (qform_code and sform_code are 0), so left and right are "
            "unknown; set its sform."
        )
    unit = {0: "not stored", 1: "m", 2: "mm", 3: "micron"}.get(int(header["xyzt_units"]) & 7, "of an unknown code")
    if unit not in ("mm", "not stored"):
        raise InputError(f"cannot read {path}: its unit of length is {unit}, and mm is needed; convert its header.")
    try:
        both = _two_geometries(image)
    except Exception as error:
        raise InputError(
            f"cannot read {path}: its qform is damaged ({first_line(error)}); repair its header."
        ) from error
    if both is not None and header["qform_code"] == header["sform_code"]:
        lengths = [np.linalg.norm(matrix[:3, :3], axis=0) for matrix in both]
        turned = np.linalg.det(both[0][:3, :3]) * np.linalg.det(both[1][:3, :3]) < 0
        if turned or not np.allclose(*lengths, rtol=1e-2):
            raise InputError(
                f"cannot read {path}: its two geometries contradict each other (qform and sform, both of code "
                f"{int(header['qform_code'])}, differ in {'left and right' if turned else 'spacing'}); remove the "
                "wrong one."
            )


def _two_geometries(image: Any) -> list[np.ndarray] | None:
    header = image.header
    if "qform_code" not in header or min(int(header["qform_code"]), int(header["sform_code"])) <= 0:
        return None
    return [np.asarray(header.get_qform()), np.asarray(header.get_sform())]

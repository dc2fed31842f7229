"""NRRD and MetaImage in, by SimpleITK, after the header said that it holds one volume in a known space."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from monai_memeff.data.float32 import as_float32
from monai_memeff.data.nifti_checks import first_line
from monai_memeff.errors import InputError
from monai_memeff.geometry.space import LONG, TO_RAS

HEADER_BYTES = 2**16
NRRD = (".nrrd", ".nhdr")


def read_with_itk(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read a NRRD or MetaImage file.

    Args:
        path: ends in .nrrd, .nhdr, .mha or .mhd.

    Returns:
        float32 (H, W, D), the float64 (4, 4) affine to millimeters (LPS), and no notes.

    Raises:
        InputError: SimpleITK is not installed, or the file is damaged, not one volume, or says nothing of its space.
    """
    try:
        import SimpleITK
    except ImportError:
        raise InputError(f"reading {path} needs SimpleITK: pip install SimpleITK, or convert it to NIfTI.") from None
    header = _header(path)
    check = _check_nrrd if path.suffix.lower() in NRRD else _check_meta
    check(path, header)
    try:
        image = SimpleITK.ReadImage(str(path))
        values = SimpleITK.GetArrayFromImage(image)
        shape, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
        spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
        directions = np.array(image.GetDirection()).reshape(len(shape), len(shape))
        _check_voxels(path, header, values.nbytes)
    except Exception as error:
        reason = first_line(RuntimeError(re.sub(r"(?s).*(ERROR|error): ", "", str(error))))
        raise InputError(f"cannot read {path}: {reason}; check that it is a whole image.") from error
    if components != 1 or values.dtype.kind not in "iuf" or len(shape) != 3:
        raise InputError(
            f"cannot read {path}: it holds {' x '.join(map(str, shape))} voxels of {components} components, and one 3D "
            "volume of real numbers is needed."
        )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions * spacing, origin
    return np.ascontiguousarray(as_float32(values.transpose(2, 1, 0), path)), affine, []


def _header(path: Path) -> dict[str, str]:
    """The fields of a header in lower case; under "" the number of its bytes."""
    nrrd = path.suffix.lower() in NRRD
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"(?im)^ElementDataFile *= *[^\n]*(\n|\Z)", start)
    length = end.end() if end else len(start)
    lines = [line.decode("latin-1") for line in start[:length].splitlines()]
    if nrrd and not (lines and lines[0].startswith("NRRD")):
        raise InputError(f"cannot read {path}: it is no NRRD file; check its name.")
    fields = (line.partition(":" if nrrd else "=") for line in lines)
    return {"": str(length), **{key.strip().lower(): value.strip() for key, _, value in fields if key}}


def _check_nrrd(path: Path, header: dict[str, str]) -> None:
    """Refuse what ITK would read with a guess."""
    space = header.get("space", "missing")
    placed = LONG.get(space.upper(), space.upper()) in TO_RAS and {"space directions", "space origin"} <= set(header)
    if not placed or "none" in header["space directions"]:
        raise InputError(
            f"cannot read {path}: its space is {space}, and one of {', '.join(TO_RAS)} with three directions and an "
            "origin is needed; set its geometry."
        )
    units = set(re.findall(r'"([^"]*)"', header.get("space units", ""))) - {"mm", "millimeter", ""}
    if units:
        raise InputError(f"cannot read {path}: its unit of length is {', '.join(sorted(units))}, and mm is needed.")
    skipped = {key for key in ("line skip", "lineskip", "byte skip", "byteskip") if header.get(key, "0") != "0"}
    if skipped or header.get("encoding", "").lower() not in ("raw", "gzip", "gz"):
        raise InputError(f"cannot read {path}: raw or gzip voxels without skips are read; convert it to NIfTI.")


def _check_meta(path: Path, header: dict[str, str]) -> None:
    """Refuse what ITK would read with a guess."""
    if not {"transformmatrix", "rotation", "orientation"} & set(header):
        raise InputError(f"cannot read {path}: it stores no orientation (TransformMatrix); set its geometry.")
    if "elementspacing" not in header or header.get("headersize", "0") != "0":
        raise InputError(f"cannot read {path}: it needs ElementSpacing, and no HeaderSize; convert it to NIfTI.")
    if header.get("binarydata", "False").lower() != "true":
        raise InputError(f"cannot read {path}: its voxels are text (BinaryData); convert it to NIfTI.")


def _check_voxels(path: Path, header: dict[str, str], needed: int) -> None:
    """Compare the bytes of the voxels, unpacked with their checksum, with those that the header announces."""
    nrrd = path.suffix.lower() in NRRD
    name = header.get("data file", header.get("datafile", "LOCAL")) if nrrd else header.get("elementdatafile", "LOCAL")
    source = path if name.upper() == "LOCAL" else path.parent / name
    with open(source, "rb") as file:
        file.seek(int(header[""]) if source == path else 0)
        content = file.read()
    packed = header["encoding"].lower() != "raw" if nrrd else header.get("compresseddata", "False").lower() == "true"
    found = len(gzip.decompress(content) if nrrd else zlib.decompress(content)) if packed else len(content)
    if found != needed:
        raise ValueError(f"{found} bytes of voxels, and its header announces {needed}")

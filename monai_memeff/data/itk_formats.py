"""NRRD and MetaImage in, by SimpleITK, after the header said that it holds one volume in a known space."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from monai_memeff.data.nifti_checks import first_line
from monai_memeff.errors import InputError
from monai_memeff.geometry.space import LONG, TO_RAS

HEADER_BYTES = 2**16


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
    _check_header(path)
    try:
        image = SimpleITK.ReadImage(str(path))
        values = SimpleITK.GetArrayFromImage(image)
        shape, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
        spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
        directions = np.array(image.GetDirection()).reshape(len(shape), len(shape))
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
    return np.ascontiguousarray(values.transpose(2, 1, 0), dtype=np.float32), affine, []


def _check_header(path: Path) -> None:
    """Refuse what ITK would read with a guess: a space that is missing or unknown, lengths that are not in mm."""
    with open(path, "rb") as file:
        header = re.split(rb"\r?\n\r?\n|\nElementDataFile", file.read(HEADER_BYTES), maxsplit=1)[0]
    lines = [line.decode("latin-1") for line in header.splitlines()]
    said = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        if not lines or not lines[0].startswith("NRRD"):
            raise InputError(f"cannot read {path}: it is no NRRD file; check its name.")
        space = said.get("space", "missing").upper()
        if LONG.get(space, space) not in TO_RAS or "space directions" not in said or "space origin" not in said:
            raise InputError(
                f"cannot read {path}: its space is {said.get('space', 'missing')}, and one of {', '.join(TO_RAS)} with "
                "directions and origin is needed; set its geometry."
            )
        units = set(re.findall(r'"([^"]*)"', said.get("space units", ""))) - {"mm", "millimeter", ""}
        if units:
            raise InputError(f"cannot read {path}: its unit of length is {', '.join(sorted(units))}, and mm is needed.")
        return
    equal = {key.strip().lower(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    if not {"transformmatrix", "rotation", "orientation"} & set(equal):
        raise InputError(f"cannot read {path}: it stores no orientation (TransformMatrix); set its geometry.")

"""Files in and out: volumes that are read exactly or refused in one line, and writes that are whole or absent."""

from typing import TYPE_CHECKING, Any

from monai_memeff.data.atomic import atomic_write, check_other_file

if TYPE_CHECKING:
    from monai_memeff.data.monai_reader import VolumeReader
    from monai_memeff.data.nifti import LabelFile, save_nifti
    from monai_memeff.data.nifti_checks import open_nifti
    from monai_memeff.data.volume import ReadVolume, read_volume

HOMES = {
    "LabelFile": "nifti", "ReadVolume": "volume", "VolumeReader": "monai_reader", "open_nifti": "nifti_checks",
    "read_volume": "volume", "save_nifti": "nifti",
}  # fmt: skip
"""Loaded when they are used: the command line writes files without torch."""

__all__ = [
    "LabelFile", "ReadVolume", "VolumeReader", "atomic_write", "check_other_file", "open_nifti", "read_volume",
    "save_nifti",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)

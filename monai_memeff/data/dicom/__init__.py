"""DICOM series in: one regular stack of slices is read exactly, all else is refused by the names of slices."""

from monai_memeff.data.dicom.read import read_dicom

__all__ = ["read_dicom"]

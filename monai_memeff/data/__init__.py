"""Files in and out: volumes that are read exactly or refused in one line, and writes that are whole or absent."""

from monai_memeff.data.atomic import atomic_write, check_other_file
from monai_memeff.data.nifti import LabelFile, save_nifti
from monai_memeff.data.nifti_checks import open_nifti

__all__ = ["LabelFile", "atomic_write", "check_other_file", "open_nifti", "save_nifti"]

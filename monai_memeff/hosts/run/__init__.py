"""`memeff run`: studies through any MONAI bundle, DICOM SEG or NIfTI out, without a server."""

from monai_memeff.hosts.run.command import run_studies

__all__ = ["run_studies"]

"""What `memeff run` writes: labels with names and codes, DICOM SEG, NIfTI, reports."""

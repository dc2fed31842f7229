"""Files in and out: volumes that are read exactly or refused in one line, and writes that are whole or absent."""

from monai_memeff.data.atomic import atomic_write, check_other_file

__all__ = ["atomic_write", "check_other_file"]

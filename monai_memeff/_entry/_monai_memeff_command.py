"""Where the console script `memeff` begins; installed beside the package, so that the package knows who imports it."""

from monai_memeff.cli import main

__all__ = ["main"]

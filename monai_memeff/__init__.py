"""monai-memeff: memory-efficient 3D models for MONAI and nnU-Net pipelines, switched on by configuration alone."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["__version__", "apps", "clstm", "halo", "occupancy", "sparse", "transforms"]

# MONAI finds short names in modules that are loaded, so an import loads everything. Only the process of the command
# `memeff` (the console script, or `python -m monai_memeff`) waits until an engine is needed: `memeff --help` is quick.
_IN_COMMAND = "_monai_memeff_command" in sys.modules or (sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv)

if TYPE_CHECKING or not _IN_COMMAND:
    from monai_memeff import apps, clstm, halo, occupancy, sparse, transforms


def __getattr__(name: str) -> ModuleType:
    """Import a subpackage on first use.

    Raises:
        AttributeError: the package has no such subpackage.
    """
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its subpackages are {', '.join(__all__[1:])}")

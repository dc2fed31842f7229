"""monai-memeff: memory-efficient 3D models for MONAI and nnU-Net pipelines, switched on by configuration alone."""

from monai_memeff import apps, clstm, halo, occupancy, sparse

__version__ = "0.1.0"

__all__ = ["__version__", "apps", "clstm", "halo", "occupancy", "sparse"]

"""Points for sparse networks: what torch-points3d offered for sparse networks, on this package's own layers.

The layers are in ``monai_memeff.sparse.points.nn``: ``from monai_memeff.sparse.points import nn as snn``.
"""

from monai_memeff.sparse.points import nn
from monai_memeff.sparse.points.bridge import data_from_sparse, mask_from_points, points_from_mask, to_sparse_tensor
from monai_memeff.sparse.points.crops import CubeCrop, FixedPoints, RandomSphere, RandomSphereDropout, SphereSampling
from monai_memeff.sparse.points.data import Data
from monai_memeff.sparse.points.features import AddFeatsByKeys, AddOnes, XYZFeature
from monai_memeff.sparse.points.grid_sampling import GridSampling3D
from monai_memeff.sparse.points.placed import origin_of, placed_coordinates

__all__ = [
    "AddFeatsByKeys",
    "AddOnes",
    "CubeCrop",
    "Data",
    "FixedPoints",
    "GridSampling3D",
    "RandomSphere",
    "RandomSphereDropout",
    "SphereSampling",
    "XYZFeature",
    "data_from_sparse",
    "mask_from_points",
    "nn",
    "origin_of",
    "placed_coordinates",
    "points_from_mask",
    "to_sparse_tensor",
]

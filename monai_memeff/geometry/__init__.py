"""Integers and affines: voxel keys, grids and spaces; torch and numpy only."""

from monai_memeff.geometry.grid import (
    check_affine,
    crop_affine,
    index_to_mm,
    index_to_unit,
    is_anisotropic,
    is_oblique,
    mm_to_index,
    resize_affine,
    sample_at,
    spacing,
    voxel_volume,
)
from monai_memeff.geometry.space import given_affine, ras_affine, space_of, to_ras
from monai_memeff.geometry.voxels import coordinates_to_keys, keys_to_coordinates

__all__ = [
    "check_affine",
    "coordinates_to_keys",
    "crop_affine",
    "given_affine",
    "index_to_mm",
    "index_to_unit",
    "is_anisotropic",
    "is_oblique",
    "keys_to_coordinates",
    "mm_to_index",
    "ras_affine",
    "resize_affine",
    "sample_at",
    "space_of",
    "spacing",
    "to_ras",
    "voxel_volume",
]

"""The vault of a skull: what lies above the face."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor

from monai_memeff.geometry import ras_affine
from monai_memeff.sparse.transforms.masks import as_volume, foreground_mask

__all__ = ["vault_mask"]

VAULT = 0.45  # depth of the vault below the vertex, as a fraction of the skull's horizontal extent


def vault_mask(skull: torch.Tensor) -> torch.Tensor:
    """The part of a skull above the face: within 0.45 of its horizontal extent below its highest point.

    Up is the axis (and its direction) nearest to the world's, from the affine of a MetaTensor, else the last axis.
    For an adult, whose skull is about 185 mm long, this is the cap 83 mm deep: down to the brow.

    Args:
        skull: binary (C, H, W, D); a voxel counts where any channel is not zero.

    Returns:
        bool (H, W, D), the bone of the vault.

    Raises:
        ValueError: not (C, H, W, D), or values that are NaN, infinite or negative.

    Examples:
        >>> int(vault_mask(torch.ones(1, 20, 20, 20)).any(0).any(0).sum())  # 0.45 of 20 slices
        9
    """
    bone = foreground_mask(as_volume(skull)).any(dim=0)
    axis, up, spacing = _up(skull)
    if not bone.any():
        return bone
    places = torch.nonzero(bone)
    extents = (places.max(dim=0).values - places.min(dim=0).values + 1).tolist()
    length = max(extent * step for i, (extent, step) in enumerate(zip(extents, spacing, strict=True)) if i != axis)
    heights = torch.arange(bone.shape[axis], device=bone.device) * (spacing[axis] if up else -spacing[axis])
    shape = [1, 1, 1]
    shape[axis] = -1
    return bone & (heights > heights[places[:, axis]].max() - VAULT * length).reshape(shape)


def _up(skull: torch.Tensor) -> tuple[int, bool, list[float]]:
    """The axis that points up, whether its index grows upwards, and millimeters per voxel."""
    if not isinstance(skull, MetaTensor):
        return 2, True, [1.0, 1.0, 1.0]
    affine = ras_affine(skull).cpu().numpy()[:3, :3]
    spacing = np.linalg.norm(affine, axis=0)
    cosines = affine[2] / spacing
    axis = int(np.abs(cosines).argmax())
    return axis, bool(cosines[axis] > 0), spacing.tolist()

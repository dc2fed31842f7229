"""From cells to what can be milled or printed: an implant's shape, in the CT's own geometry and as a surface."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from monai.transforms.utils import generate_spatial_bounding_box, get_largest_connected_component_mask

from monai_memeff.apps.skull.demo.volume import HeadVolume, resample_to_grid
from monai_memeff.data.nifti import save_nifti
from monai_memeff.geometry import crop_affine
from monai_memeff.occupancy import SurfaceMesh, logits_to_mesh

STEP_MM = 1.0  # the shape is drawn on a grid about this fine
SMOOTH, SMOOTH_SIDES = 0.75, 0.5  # standard deviations, in cells, of the smoothing of distances
AROUND = 6  # cells around the implant over which the thickness of bone is matched


def defective_bone(head: HeadVolume, defective: np.ndarray) -> np.ndarray:
    """What is left of the CT's bone when the cells of a defect are taken out of it.

    Args:
        head: the head.
        defective: bool (S, S, S), the skull without its defect, on the head's grid.

    Returns:
        bool (H, W, D) in the CT's own geometry.
    """
    out = head.bone.copy()
    place = _ct_box(head, head.skull & ~defective)
    if place is not None:
        box, affine = place
        cut = (head.skull & ~defective).astype(np.float32)
        out[box] &= resample_to_grid(cut, head.affine, affine, out[box].shape, order=0) < 0.5
    return out


def implant_field(head: HeadVolume, defective: np.ndarray, implant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shape of an implant as a smooth function that is positive inside it.

    Cells that hold any bone are thicker than the bone. So the distance to the surface of the completed skull is
    smoothed and its zero moved inwards until the volume is the cells' times ``head.fill`` (the head's own ratio of bone
    to cells), and that is cut to the cells of the implant, whose sides stay where they are.

    Args:
        head: the head.
        defective: bool (S, S, S), the skull without its defect.
        implant: bool (S, S, S), the implant on the same grid.

    Returns:
        float32 (h, w, d), in cells, on a finer grid around the implant; and that grid's affine to millimeters (RAS+).

    Raises:
        ValueError: when the implant is empty.
    """
    if not implant.any():
        raise ValueError("an empty implant has no shape: no cell of it is set")
    wide, box = _box(implant, AROUND), _box(implant, 2)
    thinned = np.full(implant.shape, -1.0)
    thinned[wide] = _thinned((defective | implant)[wide], head.fill)
    factor = max(2, math.ceil(head.cell_mm / STEP_MM))
    affine = head.affine.copy()
    affine[:3, 3] = head.affine[:3] @ [*(part.start - 0.5 + 0.5 / factor for part in box), 1.0]
    affine[:3, :3] /= factor
    bone = _finer(thinned[box], factor)
    piece = _finer(_signed_distance(implant[box], SMOOTH_SIDES), factor)
    return np.minimum(bone, piece), affine


def _signed_distance(mask: np.ndarray, smooth: float) -> np.ndarray:
    """Distance to the surface of a mask in cells, positive inside, smoothed."""
    from scipy import ndimage

    padded = np.pad(mask, 2, mode="edge")
    inside = ndimage.distance_transform_edt(padded) if not padded.all() else np.full(padded.shape, 3.0)
    outside = ndimage.distance_transform_edt(~padded)
    distance = np.where(padded, inside - 0.5, 0.5 - outside)
    return ndimage.gaussian_filter(np.clip(distance, -3, 3), smooth)[2:-2, 2:-2, 2:-2]


def _thinned(mask: np.ndarray, fill: float) -> np.ndarray:
    """Signed distance whose positive part has the wanted fraction of the mask's volume; thin walls lose less."""
    from scipy import ndimage

    distance = _signed_distance(mask, SMOOTH)
    wall = np.clip(ndimage.maximum_filter(distance, 3), 0.0, 1.0)
    fine, fine_wall, target = _finer(distance, 2), _finer(wall, 2), fill * mask.mean()
    low, high = 0.0, 0.8
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if (fine > middle * fine_wall).mean() > target else (low, middle)
    return distance - low * wall


def _finer(values: np.ndarray, factor: int) -> np.ndarray:
    """Sample a grid ``factor`` times as finely, each cell divided evenly."""
    from scipy import ndimage

    step = np.full(3, 1.0 / factor)
    shape = tuple(n * factor for n in values.shape)
    offset = (1 / factor - 1) / 2
    return ndimage.affine_transform(values, step, offset, shape, output=np.float32, order=3, mode="nearest")


def implant_in_ct(head: HeadVolume, field: np.ndarray, affine: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """Draw an implant into the CT's own geometry, where it takes no voxel of the bone that is left.

    Args:
        head: the head.
        field: Field from :func:`implant_field`.
        affine: its affine.
        remaining: bool (H, W, D), from :func:`defective_bone`.

    Returns:
        bool (H, W, D) in the CT's own geometry.
    """
    out = np.zeros_like(head.bone)
    place = _ct_box(head, field > 0, affine)
    if place is not None:
        box, target = place
        out[box] = resample_to_grid(field, affine, target, out[box].shape, outside=-1.0) > 0
    return out & ~remaining


def _ct_box(
    head: HeadVolume, mask: np.ndarray, affine: np.ndarray | None = None
) -> tuple[tuple[slice, ...], np.ndarray] | None:
    """The box of the CT that holds a mask of another grid, and that box's affine; None when they do not meet."""
    source = _box(mask, 1)
    corners = np.array(np.meshgrid(*((part.start - 0.5, part.stop - 0.5) for part in source))).reshape(3, -1)
    step = np.linalg.inv(head.ct_affine) @ (head.affine if affine is None else affine)
    index = step[:3, :3] @ corners + step[:3, 3:]
    low = np.clip(np.floor(index.min(axis=1)), 0, head.bone.shape).astype(int)
    high = np.clip(np.ceil(index.max(axis=1)) + 1, 0, head.bone.shape).astype(int)
    if (high <= low).any():
        return None
    return tuple(map(slice, low, high)), crop_affine(head.ct_affine, low.tolist()).numpy()


def implant_mesh(field: np.ndarray, affine: np.ndarray) -> SurfaceMesh:
    """The closed surface of an implant.

    Args:
        field: positive inside; its largest connected piece is taken and its cavities are filled.
        affine: (4, 4) index -> millimeters.

    Returns:
        The surface in millimeters; every edge belongs to exactly two triangles.

    Raises:
        ValueError: when nothing is positive.
    """
    from scipy import ndimage

    solid = ndimage.binary_fill_holes(get_largest_connected_component_mask(field > 0))
    if not solid.any():
        raise ValueError("an empty implant has no surface: no value of its field is positive")
    away = 0.05  # keeps vertices off the corners, where triangles would degenerate
    values = np.where(solid, np.maximum(field, away), np.minimum(field, -away))
    return logits_to_mesh(torch.from_numpy(values)[None], affine)


def _box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    return tuple(map(slice, *generate_spatial_bounding_box(mask[None], margin=margin, allow_smaller=True)))


def write_mask(path: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    """Write a mask as NIfTI (uint8) with a given affine in RAS+ millimeters."""
    save_nifti(path, mask.astype(np.uint8), affine)

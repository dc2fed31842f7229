"""The classical method to compare with: mirror the healthy side of a skull onto the defect, registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from monai.transforms.utils import get_largest_connected_component_mask
from nibabel.affines import apply_affine

from monai_memeff.apps.skull.demo.volume import resample_to_grid
from monai_memeff.geometry import spacing

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

POINTS = 6000  # surface points that are registered
KEEP = 0.75  # fraction of the pairs that a step trusts: the rest may lie on the defect, the jaw or the neck
GAP_MM = 6.0  # mirrored bone farther than this from any bone is missing, not misplaced
RING_MM = 30.0  # the second registration looks this far around the defect
SLIDE = 0.2  # weight of a pair's distance along the surface, where its distance across it has 1


@dataclass(frozen=True)
class MirrorResult:
    """What mirroring found.

    Attributes:
        implant: bool (S, S, S), mirrored bone where the skull has none; empty when nothing is missing.
        mirrored: bool (S, S, S), the registered mirror image of the whole skull.
        transform: float64 (4, 4), millimeters -> millimeters, skull -> mirrored skull; its determinant is -1.
        residual_mm: mean distance of the trusted surface points to the skull.
    """

    implant: np.ndarray
    mirrored: np.ndarray
    transform: np.ndarray
    residual_mm: float


def mirror_implant(defective: np.ndarray, affine: np.ndarray) -> MirrorResult:
    """Complete a skull by its own mirror image.

    The surface is reflected at several planes around the sagittal plane through its middle, every reflection is
    registered rigidly to the skull by a trimmed iterative closest point search, and the best one kept. Nothing says
    where the defect is: the missing part is the largest connected piece of mirrored bone that lies more than 6 mm from
    any bone of the skull in its upper part, grown by as much inside the mirrored bone. Bone around that piece is then
    registered once more, by itself, so that the patch meets its rim.

    Args:
        defective: bool (S, S, S); its first axis runs from side to side, its last one up.
        affine: (4, 4), index -> millimeters.

    Returns:
        The implant and how it was found.

    Raises:
        ValueError: when the skull has too few voxels to register.
    """
    surface = _surface(defective, affine)
    if len(surface.points) < 50:
        raise ValueError(
            f"a skull of {len(surface.points)} surface voxels cannot be registered, at least 50 are needed"
        )
    tree = _tree(surface.points)
    best, residual = _best_start(surface, tree)
    mirrored = transform_mask(defective, affine, best)
    patch = _missing(mirrored, defective, affine)
    if patch.any():
        around = _around(surface, best, patch, affine)
        if len(around.points) >= 50:
            local, _ = _icp(around, surface, tree, best, steps=30, keep=0.85, slide=1.0)
            closer = _missing(transform_mask(defective, affine, local), defective, affine)
            if closer.any():
                best, patch = local, closer
    return MirrorResult(patch, transform_mask(defective, affine, best), best, residual)


def _tree(points: np.ndarray) -> cKDTree:
    from scipy.spatial import cKDTree

    return cKDTree(points)


@dataclass(frozen=True)
class _Surface:
    """Points (N, 3) in millimeters and the unit normals (N, 3) of the surface there."""

    points: np.ndarray
    normals: np.ndarray

    def subset(self, index: np.ndarray) -> _Surface:
        return _Surface(self.points[index], self.normals[index])


def _surface(mask: np.ndarray, affine: np.ndarray) -> _Surface:
    from scipy import ndimage

    index = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    smooth = ndimage.gaussian_filter(mask.astype(np.float32), 1.0)
    slope = np.stack([ndimage.sobel(smooth, axis)[tuple(index.T)] for axis in range(3)], axis=1)
    normals = -slope @ np.linalg.inv(affine)[:3, :3]
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    return _Surface(apply_affine(affine, index), normals)


def _thin(surface: _Surface, count: int) -> _Surface:
    """An even choice of at most ``count`` points, the same every time."""
    if len(surface.points) <= count:
        return surface
    return surface.subset(np.random.default_rng(0).permutation(len(surface.points))[:count])


def _reflection(points: np.ndarray, yaw: float, roll: float, shift: float) -> np.ndarray:
    """The reflection at a plane near the sagittal one through the middle of the points."""
    normal = np.array([np.cos(yaw) * np.cos(roll), np.sin(yaw) * np.cos(roll), np.sin(roll)])
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    out = np.eye(4)
    out[:3, :3] -= 2 * np.outer(normal, normal)
    out[:3, 3] = 2 * normal * (normal @ middle + shift)
    return out


def _best_start(surface: _Surface, tree: cKDTree) -> tuple[np.ndarray, float]:
    """Search from several planes, coarsely; refine the best three."""
    coarse, fine = _thin(surface, POINTS // 6), _thin(surface, POINTS)
    starts = []
    for yaw in np.radians([-8.0, 0.0, 8.0]):
        for roll in np.radians([-6.0, 0.0, 6.0]):
            for shift in (-5.0, 5.0):
                start = _reflection(surface.points, yaw, roll, shift)
                starts.append(_icp(coarse, surface, tree, start, steps=12))
    starts.sort(key=lambda item: item[1])
    finished = [_icp(fine, surface, tree, start, steps=40) for start, _ in starts[:3]]
    return min(finished, key=lambda item: item[1])


def _icp(
    source: _Surface,
    target: _Surface,
    tree: cKDTree,
    start: np.ndarray,
    steps: int,
    keep: float = KEEP,
    slide: float = SLIDE,
) -> tuple[np.ndarray, float]:
    """Trimmed iterative closest point, to planes (Chen and Medioni 1992): the rigid motion after ``start``.

    A pair is trusted when it is among the nearest and its normals agree, so that inner and outer table do not meet.

    Returns:
        The whole transform (4, 4), and the mean distance of the trusted pairs.
    """
    total, best, least = start.copy(), start.copy(), np.inf
    for _ in range(steps):
        moved = apply_affine(total, source.points)
        turned = source.normals @ total[:3, :3].T
        distance, index = tree.query(moved)
        cost = distance + 1e3 * ((turned * target.normals[index]).sum(axis=1) < 0.5)
        trusted = cost <= np.quantile(cost, keep)
        mean = float(np.minimum(cost, 20.0)[trusted].mean())
        if mean < least - 1e-4:
            best, least = total, mean
        pairs = trusted & (cost < 1e3)
        if pairs.sum() < 20:
            break
        step = _point_to_plane_step(moved[pairs], target.subset(index[pairs]), slide)
        total = step @ total
        if np.abs(step - np.eye(4)).max() < 1e-4:
            break
    return best, least


def _point_to_plane_step(moved: np.ndarray, target: _Surface, slide: float) -> np.ndarray:
    """The small rigid motion that brings points onto the planes of their partners, in the least-squares sense.

    The partners themselves pull with a small weight: on a cap of a ball the planes alone let it turn freely.
    """
    from scipy.spatial.transform import Rotation

    middle = moved.mean(axis=0)
    apart = target.points - moved
    system, gap = np.zeros((6, 6)), np.zeros(6)
    for direction, weight in ((target.normals, 1.0), *((axis, slide) for axis in np.eye(3))):
        rows = np.concatenate(np.broadcast_arrays(np.cross(moved - middle, direction), direction), axis=1)
        system += weight * rows.T @ rows
        gap += weight * rows.T @ (apart * direction).sum(axis=1)
    turn = np.linalg.solve(system, gap)
    out = np.eye(4)
    out[:3, :3] = Rotation.from_rotvec(turn[:3]).as_matrix()
    out[:3, 3] = middle - out[:3, :3] @ middle + turn[3:]
    return out


def transform_mask(mask: np.ndarray, affine: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Move a mask by a transform in millimeters, on its own grid."""
    return resample_to_grid(mask.astype(np.float32), transform @ affine, affine, mask.shape) >= 0.5


def _missing(mirrored: np.ndarray, defective: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The piece of mirrored bone that the skull lacks."""
    from scipy import ndimage

    steps = spacing(affine)
    gap = max(GAP_MM, 1.8 * max(steps))
    far = ndimage.distance_transform_edt(~defective, sampling=steps)
    seed = mirrored & (far > gap)
    seed[:, :, : _floor(defective, np.array(steps))] = False
    seed = get_largest_connected_component_mask(seed)
    if not seed.any():
        return seed
    reach = ndimage.distance_transform_edt(~seed, sampling=steps) <= 1.5 * gap
    return get_largest_connected_component_mask(mirrored & ~defective & reach)


def _floor(mask: np.ndarray, steps: np.ndarray) -> int:
    """The lowest slice of the vault: 0.55 of the skull's horizontal extent below its top."""
    index = np.argwhere(mask)
    extent = ((index.max(axis=0) - index.min(axis=0) + 1) * steps)[:2].max()
    return max(0, int(index[:, 2].max() - 0.55 * extent / steps[2]))


def _around(surface: _Surface, transform: np.ndarray, patch: np.ndarray, affine: np.ndarray) -> _Surface:
    """Those points whose mirror image lies in a ring around the patch."""
    centers = apply_affine(affine, np.argwhere(patch))
    distance, _ = _tree(centers).query(apply_affine(transform, surface.points))
    return surface.subset((distance > 0.5 * max(spacing(affine))) & (distance < RING_MM))

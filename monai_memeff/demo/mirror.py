"""The classical method to compare with: mirror the healthy side of a skull onto the defect, registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from monai_memeff.demo.volume import largest_component, resample

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

POINTS = 6000  # surface points that are registered
KEEP = 0.75  # share of the pairs that a step trusts: the rest may lie on the defect, the jaw or the neck
GAP_MM = 6.0  # mirrored bone farther than this from any bone is missing, not misplaced
RING_MM = 30.0  # the second registration looks this far around the defect


@dataclass(frozen=True)
class MirrorResult:
    """What mirroring found.

    Attributes:
        implant: bool (S, S, S), mirrored bone where the skull has none; empty when nothing is missing.
        mirrored: bool (S, S, S), the registered mirror image of the whole skull.
        transform: float64 (4, 4), millimetres -> millimetres, skull -> mirrored skull; its determinant is -1.
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
        affine: (4, 4), index -> millimetres.

    Returns:
        The implant and how it was found.

    Raises:
        ValueError: when the skull has too few voxels to register.
    """
    surface = _surface(defective)
    if len(surface) < 50:
        raise ValueError(f"a skull of {len(surface)} surface voxels cannot be registered, at least 50 are needed")
    points = _thin(surface, POINTS) @ affine[:3, :3].T + affine[:3, 3]
    tree = _tree(surface @ affine[:3, :3].T + affine[:3, 3])
    best, residual = _best_start(points, tree)
    mirrored = _carry(defective, affine, best)
    patch = _missing(mirrored, defective, affine)
    if patch.any():
        around = _near(points, best, patch, affine)
        if len(around) >= 50:
            local, _ = _icp(around, tree, best, steps=30, keep=0.85)
            closer = _missing(_carry(defective, affine, local), defective, affine, patch)
            if closer.any():
                best, patch = local, closer
    return MirrorResult(patch, _carry(defective, affine, best), best, residual)


def _tree(points: np.ndarray) -> cKDTree:
    from scipy.spatial import cKDTree

    return cKDTree(points)


def _surface(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return np.argwhere(mask & ~ndimage.binary_erosion(mask)).astype(np.float64)


def _thin(points: np.ndarray, count: int) -> np.ndarray:
    """An even choice of at most ``count`` points, the same every time."""
    if len(points) <= count:
        return points
    return points[np.random.default_rng(0).permutation(len(points))[:count]]


def _reflection(points: np.ndarray, yaw: float, roll: float, shift: float) -> np.ndarray:
    """The reflection at a plane near the sagittal one through the middle of the points."""
    normal = np.array([np.cos(yaw) * np.cos(roll), np.sin(yaw) * np.cos(roll), np.sin(roll)])
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    out = np.eye(4)
    out[:3, :3] -= 2 * np.outer(normal, normal)
    out[:3, 3] = 2 * normal * (normal @ middle + shift)
    return out


def _best_start(points: np.ndarray, tree: cKDTree) -> tuple[np.ndarray, float]:
    """Search from several planes, coarsely; refine the best three."""
    coarse = _thin(points, POINTS // 6)
    starts = []
    for yaw in np.radians([-8.0, 0.0, 8.0]):
        for roll in np.radians([-6.0, 0.0, 6.0]):
            for shift in (-5.0, 5.0):
                starts.append(_icp(coarse, tree, _reflection(points, yaw, roll, shift), steps=12))
    starts.sort(key=lambda item: item[1])
    finished = [_icp(points, tree, start, steps=60) for start, _ in starts[:3]]
    return min(finished, key=lambda item: item[1])


def _icp(
    points: np.ndarray, tree: cKDTree, start: np.ndarray, steps: int, keep: float = KEEP
) -> tuple[np.ndarray, float]:
    """Trimmed iterative closest point: the rigid motion after ``start`` that brings the points onto the tree's.

    Returns:
        The whole transform (4, 4), and the mean distance of the trusted pairs.
    """
    total, last = start.copy(), np.inf
    data: Any = tree.data
    for _ in range(steps):
        moved = points @ total[:3, :3].T + total[:3, 3]
        distance, index = tree.query(moved)
        trusted = distance <= np.quantile(distance, keep)
        mean = float(distance[trusted].mean())
        if last - mean < 1e-4:
            break
        last = mean
        total = _rigid(moved[trusted], data[index[trusted]]) @ total
    return total, last


def _rigid(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation and shift that bring paired points together in the least-squares sense (Kabsch)."""
    a, b = source.mean(axis=0), target.mean(axis=0)
    u, _, vt = np.linalg.svd((source - a).T @ (target - b))
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(vt.T @ u.T))])
    out = np.eye(4)
    out[:3, :3] = vt.T @ flip @ u.T
    out[:3, 3] = b - out[:3, :3] @ a
    return out


def _carry(mask: np.ndarray, affine: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Move a mask by a transform in millimetres, on its own grid."""
    return resample(mask.astype(np.float32), transform @ affine, affine, mask.shape) >= 0.5


def _missing(
    mirrored: np.ndarray, defective: np.ndarray, affine: np.ndarray, guess: np.ndarray | None = None
) -> np.ndarray:
    """The piece of mirrored bone that the skull lacks."""
    from scipy import ndimage

    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    gap = max(GAP_MM, 1.8 * spacing.max())
    far = ndimage.distance_transform_edt(~defective, sampling=spacing)
    seed = mirrored & (far > gap)
    seed[:, :, : _floor(defective, spacing)] = False
    if guess is not None:
        seed &= guess
    seed = largest_component(seed)
    if not seed.any():
        return seed
    reach = ndimage.distance_transform_edt(~seed, sampling=spacing) <= 1.5 * gap
    return largest_component(mirrored & ~defective & reach)


def _floor(mask: np.ndarray, spacing: np.ndarray) -> int:
    """The lowest slice of the vault: 0.55 of the skull's horizontal extent below its top."""
    index = np.argwhere(mask)
    extent = ((index.max(axis=0) - index.min(axis=0) + 1) * spacing)[:2].max()
    return max(0, int(index[:, 2].max() - 0.55 * extent / spacing[2]))


def _near(points: np.ndarray, transform: np.ndarray, patch: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Those points whose mirror image lies in a ring around the patch."""
    centres = np.argwhere(patch) @ affine[:3, :3].T + affine[:3, 3]
    distance, _ = _tree(centres).query(points @ transform[:3, :3].T + transform[:3, 3])
    spacing = float(np.linalg.norm(affine[:3, :3], axis=0).max())
    return points[(distance > 0.5 * spacing) & (distance < RING_MM)]

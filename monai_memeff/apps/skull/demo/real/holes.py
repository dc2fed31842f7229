"""Where a skull really has a hole, without an annotation: directions of the vault in which no bone lies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nibabel.affines import apply_affine

from monai_memeff.apps.skull.vault import VAULT

PIXELS = 157  # edge of the map of the vault: about 2 mm of bone for each pixel
WIDEST = np.radians(110)  # angle from the vertex at the edge of the map; the vault is what lies within 90 degrees
LEAST_CM2 = 4.0
MOST = 0.6  # of the vault: with less bone than that it is none
OPENING = 1  # pixels by which gaps are opened: thin bone below the threshold is not a hole
NEAR_MM = 30.0  # a ray meets no bone of the vault before this depth
ACROSS_MM, ALONG_MM = 15.0, 10.0  # the zone of a hole reaches this far in and out of its surface, and beyond its rim


@dataclass(frozen=True)
class SkullHole:
    """A hole of the vault.

    Attributes:
        zone: bool (S, S, S), cells in which missing bone of this and all further holes may lie, rim included.
        core: bool (S, S, S), the same without the rim and deeper: what a tool would cut to make this hole alone.
        surface: float64 (N, 3), points of the missing bone's middle surface in millimeters, about 2 mm apart.
        area_cm2: area of that surface.
        others_cm2: areas of further holes, largest first.
    """

    zone: np.ndarray
    core: np.ndarray
    surface: np.ndarray
    area_cm2: float
    others_cm2: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Map:
    """The vault seen from the middle of the cavity: a disk whose middle is the vertex.

    An azimuthal equidistant projection: distance from the middle is the angle from the vertex.
    """

    center: np.ndarray
    directions: np.ndarray  # (P, P, 3)
    inside: np.ndarray  # bool (P, P), the vault
    whole: np.ndarray  # bool (P, P), and what lies below it
    radius: np.ndarray  # (P, P) millimeters to the middle of the bone, NaN where there is none


def find_hole(skull: np.ndarray, affine: np.ndarray, least_cm2: float = LEAST_CM2) -> SkullHole | None:
    """The largest hole of the vault.

    Rays leave a point in the middle of the cranial cavity, at the height of the brow, and those that go upwards are
    laid out on a disk. A vault is met by each of them; connected directions without bone, opened by a pixel and at
    least 4 square centimeters wide, are a hole, on whichever side and across the midline too, with what is missing
    below it down to 20 degrees under the brow. Its surface spans the bone around it. Holes
    that lie below the brow altogether are not looked for: orbits and foramina are among them. Where less than 4 square
    centimeters is wanted, nothing is opened: slits are found, and with them thin bone below the threshold.

    Args:
        skull: bool (S, S, S); its first axis runs from side to side, its last one up.
        affine: (4, 4), index -> millimeters.
        least_cm2: the smallest area that is a hole.

    Returns:
        The hole, or None.
    """
    from scipy import ndimage

    seen = _look(skull, affine)
    missing = seen.whole & np.isnan(seen.radius)
    if not (missing & seen.inside).any() or (missing & seen.inside).sum() > MOST * seen.inside.sum():
        return None
    if least_cm2 < LEAST_CM2:
        labels, count = ndimage.label(missing, np.ones((3, 3)))
    else:
        labels, count = ndimage.label(ndimage.binary_opening(missing, np.ones((3, 3)), iterations=OPENING))
    filled = _continued(seen.radius)
    behind = _areas(filled) * seen.inside
    areas = [(float(behind[labels == k].sum()), k) for k in range(1, count + 1)]
    areas = sorted((item for item in areas if item[0] >= least_cm2), reverse=True)
    if not areas:
        return None
    hole = labels == areas[0][1]
    every = np.isin(labels, [k for _, k in areas])
    points = seen.center + filled[hole][:, None] * seen.directions[hole]
    zone = _near(seen, filled, every, skull.shape, affine, ALONG_MM, ACROSS_MM)
    core = _near(seen, filled, hole, skull.shape, affine, 0.0, 1.5 * ACROSS_MM)
    return SkullHole(zone, core, points, areas[0][0], tuple(area for area, _ in areas[1:]))


def in_cm2(area: float) -> str:
    """An area with its unit."""
    return f"{area:.0f} cm2" if area >= 10 else f"{area:.2g} cm2"


def _look(skull: np.ndarray, affine: np.ndarray) -> _Map:
    from scipy import ndimage

    points = apply_affine(affine, np.argwhere(skull))
    top = points[:, 2].max()
    extent = float(np.ptp(points[points[:, 2] > top - 110], axis=0)[:2].max())
    vault = points[points[:, 2] > top - VAULT * extent]
    low, high = vault.min(axis=0), vault.max(axis=0)
    center = np.array([*(low + high)[:2] / 2, top - VAULT * extent])
    axis = np.linspace(-1, 1, PIXELS)
    u, v = np.meshgrid(axis, axis, indexing="ij")
    out = np.hypot(u, v)
    angle = np.minimum(out, 1) * WIDEST
    side = np.sin(angle) / np.maximum(out, 1e-9)
    directions = np.stack([u * side, v * side, np.cos(angle)], axis=-1)
    depth = np.arange(NEAR_MM, 0.8 * extent, 0.4 * float(affine[0, 0]))
    inverse = np.linalg.inv(affine)
    index = apply_affine(inverse, center + depth[:, None, None, None] * directions)
    bone = ndimage.map_coordinates(skull.astype(np.float32), np.moveaxis(index, -1, 0), order=0, cval=0) > 0
    met = bone.any(axis=0)
    first, last = bone.argmax(axis=0), len(depth) - 1 - bone[::-1].argmax(axis=0)
    radius = np.where(met, (depth[first] + depth[last]) / 2, np.nan)
    return _Map(center, directions, angle <= np.pi / 2, out <= 1, np.where(out <= 1, radius, np.nan))


def _continued(radius: np.ndarray) -> np.ndarray:
    """Radii everywhere: linear across what is missing, which spans a part of a ball; the nearest one at the edge."""
    from scipy import ndimage
    from scipy.interpolate import griddata

    known = ~np.isnan(radius)
    smooth = ndimage.median_filter(np.where(known, radius, 0.0), 3)
    rim = known & (ndimage.distance_transform_edt(known) < 6) & (smooth > 0)
    places = np.argwhere(rim)
    filled = radius.copy()
    nearest = ndimage.distance_transform_edt(~rim, return_distances=False, return_indices=True)
    linear = griddata(places, smooth[rim], np.argwhere(~known), method="linear")
    filled[~known] = np.where(np.isnan(linear), smooth[tuple(nearest)][~known], linear)
    return filled


def _areas(radius: np.ndarray) -> np.ndarray:
    """Square centimeters of bone behind every pixel."""
    axis = np.linspace(-1, 1, PIXELS)
    angle = np.minimum(np.hypot(*np.meshgrid(axis, axis, indexing="ij")), 1) * WIDEST
    step = (axis[1] - axis[0]) * WIDEST
    return radius**2 * np.sinc(angle / np.pi) * step**2 / 100


def _near(
    seen: _Map,
    radius: np.ndarray,
    hole: np.ndarray,
    shape: tuple[int, ...],
    affine: np.ndarray,
    along_mm: float,
    across_mm: float,
) -> np.ndarray:
    """Cells near the surface of a hole."""
    from scipy import ndimage

    pixel_mm = WIDEST * float(np.median(radius[hole])) * 2 / (PIXELS - 1)
    wide = ndimage.distance_transform_edt(~hole) <= along_mm / pixel_mm
    cells = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    away = apply_affine(affine, cells) - seen.center
    depth = np.linalg.norm(away, axis=-1)
    flat = np.hypot(away[..., 0], away[..., 1])
    angle = np.arctan2(flat, away[..., 2]) / WIDEST
    place = np.stack([angle * away[..., i] / np.maximum(flat, 1e-9) for i in (0, 1)])
    pixel = (place + 1) / 2 * (PIXELS - 1)
    meets = ndimage.map_coordinates(wide.astype(np.float32), pixel, order=0, cval=0) > 0
    surface = ndimage.map_coordinates(radius, pixel, order=1, mode="nearest")
    return meets & (np.abs(depth - surface) <= across_mm)

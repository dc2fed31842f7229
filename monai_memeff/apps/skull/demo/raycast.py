"""Shaded pictures of surfaces in a volume: orthographic rays, first crossing of zero, light, and contact shadows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

STEPS = 12  # samples of a ray that are taken together
BLOCK = 4  # voxels of a block, and pixels of a tile, that bound where a surface can be


@dataclass(frozen=True)
class View:
    """Where the picture is taken from.

    Attributes:
        forward: unit vector of the world from the camera into the scene.
        right: unit vector of the world that points right in the picture.
        up: unit vector of the world that points up in the picture.
        middle: point of the world in the middle of the picture, in millimeters.
        half_mm: half the edge of the picture in millimeters.
    """

    forward: np.ndarray
    right: np.ndarray
    up: np.ndarray
    middle: np.ndarray
    half_mm: float


def look_at(point: np.ndarray, middle: np.ndarray, half_mm: float) -> View:
    """A view of a head from the side of a point, a little from the front and at most 45 degrees from above.

    Args:
        point: what must be seen, in RAS+ millimeters.
        middle: middle of the head.
        half_mm: half the edge of the picture.

    Returns:
        The view.
    """
    direction = np.asarray(point, dtype=np.float64) - middle
    azimuth = np.arctan2(direction[1], direction[0])
    side = np.arctan2(np.sin(azimuth - np.pi / 2), np.cos(azimuth - np.pi / 2))  # 0 is the front
    azimuth -= np.clip(side, -np.radians(22), np.radians(22)) if abs(side) < 2.6 else 0.0
    elevation = np.clip(np.arctan2(direction[2], np.hypot(direction[0], direction[1])), np.radians(12), np.radians(45))
    back = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    return View(-back, right, np.cross(back, right), np.asarray(middle, dtype=np.float64), half_mm)


def raycast(
    fields: list[np.ndarray],
    colors: list[tuple[float, float, float]],
    affine: np.ndarray,
    view: View,
    pixels: int = 440,
) -> np.ndarray:
    """Draw the surfaces where fields cross zero.

    Args:
        fields: float32 (H, W, D) each, positive inside; all of one shape.
        colors: red, green and blue of each field, in [0, 1].
        affine: (4, 4), index -> millimeters, shared by the fields.
        view: the camera.
        pixels: edge of the picture.

    Returns:
        float32 (pixels, pixels, 3), first row on top, white background.
    """
    volume = torch.from_numpy(np.stack(fields))[None]
    origin, direction = _rays(volume.shape[2:], affine, view, pixels)
    joined = volume.amax(dim=1, keepdim=True)
    depth, hit = _march(joined, origin, direction, _first_block(joined, origin, direction, pixels))
    points = origin[hit] + depth[hit, None] * direction
    values = _sample(volume, points)
    paint = torch.tensor(colors)[values.argmax(dim=0)]
    slope = _slope(joined, points)
    light = _light(slope, affine, view)
    light = light * _shadow(depth, hit, pixels)[hit]
    picture = torch.ones(pixels * pixels, 3)
    picture[hit] = (paint * light[:, None]).clamp(0, 1)
    return picture.reshape(pixels, pixels, 3).numpy()


def _rays(shape: torch.Size, affine: np.ndarray, view: View, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rays enter, (P, 3), and one step along them, (3,), in voxels."""
    place = (np.arange(pixels) + 0.5) / pixels * 2 - 1
    across, down = np.meshgrid(place, -place)
    world = view.middle + view.half_mm * (across[..., None] * view.right + down[..., None] * view.up)
    world = world.reshape(-1, 3) - 1.8 * view.half_mm * view.forward
    inverse = np.linalg.inv(affine)
    origin = world @ inverse[:3, :3].T + inverse[:3, 3]
    step = inverse[:3, :3] @ view.forward
    direction = step / np.linalg.norm(step) * 0.75
    return torch.from_numpy(origin).float(), torch.from_numpy(direction).float()


def _sample(volume: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Values (C, P) of a volume (1, C, H, W, D) at points (P, 3) in voxels; linear, -1 outside."""
    extent = torch.tensor(volume.shape[2:], dtype=torch.float32)
    unit = ((2 * points + 1) / extent - 1).flip(-1)[None, :, None, None]
    return F.grid_sample(volume + 1, unit, align_corners=False)[0, :, :, 0, 0] - 1


def _first_block(joined: torch.Tensor, origin: torch.Tensor, direction: torch.Tensor, pixels: int) -> torch.Tensor:
    """Steps (P,) before which a ray meets no block of voxels with anything inside; infinite where it meets none."""
    from scipy import ndimage

    full = F.max_pool3d(joined, BLOCK, ceil_mode=True)[0, 0] > 0
    centers = torch.nonzero(full).double() * BLOCK + (BLOCK - 1) / 2
    across, down = origin[1] - origin[0], origin[pixels] - origin[0]
    place = torch.linalg.solve(torch.stack([across, down, direction], dim=1).double(), (centers - origin[0]).T)
    reach = BLOCK * 0.9  # half a block's diagonal
    tiles = -(-pixels // BLOCK)
    row, column = ((place[i] / BLOCK).floor().long() for i in (1, 0))
    seen = (row >= 0) & (row < tiles) & (column >= 0) & (column < tiles)
    depth = torch.full((tiles * tiles,), torch.inf, dtype=torch.float64)
    start = place[2] - reach / float(direction.norm())
    depth.scatter_reduce_(0, (row * tiles + column)[seen], start[seen], "amin")
    around = 2 * math.ceil(reach / BLOCK / min(float(across.norm()), float(down.norm()))) + 1
    wide = ndimage.minimum_filter(depth.reshape(tiles, tiles).numpy(), around)
    return torch.from_numpy(wide.repeat(BLOCK, 0).repeat(BLOCK, 1)[:pixels, :pixels].copy()).float().flatten()


def _march(
    joined: torch.Tensor, origin: torch.Tensor, direction: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps to the first crossing of zero on every ray (P,), and which rays cross."""
    first, last = _span(origin, direction, joined.shape[2:])
    first = torch.maximum(first, start)
    depth, found = torch.zeros(len(origin)), torch.zeros(len(origin), dtype=torch.bool)
    alive = torch.nonzero(last > first)[:, 0]
    at, ticks = first.clone(), torch.arange(STEPS + 1).float()
    while len(alive):
        steps = at[alive, None] + ticks
        points = origin[alive, None] + steps[..., None] * direction
        values = _sample(joined, points.reshape(-1, 3)).reshape(steps.shape)
        inside = values > 0
        hit, index = inside.any(dim=1), inside.float().argmax(dim=1)
        before = (index - 1).clamp(min=0)
        low, high = (values.gather(1, i[:, None])[:, 0] for i in (before, index))
        part = torch.where(index > 0, low / (low - high).clamp(max=-1e-6), torch.zeros_like(low))
        depth[alive[hit]] = (steps.gather(1, before[:, None])[:, 0] + part)[hit]
        found[alive[hit]] = True
        at[alive] += STEPS
        alive = alive[~hit & (at[alive] < last[alive])]
    return depth, found


def _span(origin: torch.Tensor, direction: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps at which rays enter and leave the volume."""
    safe = torch.where(direction.abs() < 1e-6, torch.full_like(direction, 1e-6), direction)
    faces = torch.stack([(-0.5 - origin) / safe, (torch.tensor(shape) - 0.5 - origin) / safe])
    return faces.amin(dim=0).amax(dim=1).clamp(min=0), faces.amax(dim=0).amin(dim=1)


def _slope(joined: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Gradient (P, 3) of a volume by central differences two voxels apart."""
    sides = []
    for axis in range(3):
        move = torch.zeros(3)
        move[axis] = 1.2
        sides.append(_sample(joined, points + move)[0] - _sample(joined, points - move)[0])
    return torch.stack(sides, dim=1)


def _light(slope: torch.Tensor, affine: np.ndarray, view: View) -> torch.Tensor:
    """Brightness (P,): a lamp above the left shoulder of the camera, a weaker one on it, and an even rest."""
    outwards = -slope.numpy() @ np.linalg.inv(affine)[:3, :3]
    outwards /= np.maximum(np.linalg.norm(outwards, axis=1, keepdims=True), 1e-9)
    lamp = -view.forward - 0.55 * view.right + 0.75 * view.up
    key = np.clip(outwards @ (lamp / np.linalg.norm(lamp)), 0, 1)
    front = np.clip(outwards @ -view.forward, 0, 1)
    return torch.from_numpy(0.27 + 0.56 * key + 0.26 * front).float()


def _shadow(depth: torch.Tensor, hit: torch.Tensor, pixels: int) -> torch.Tensor:
    """Darken (P,) what lies deeper than its surroundings in the picture."""
    from scipy import ndimage

    known = hit.reshape(pixels, pixels).numpy().astype(np.float32)
    deep = depth.reshape(pixels, pixels).numpy() * known
    dark = np.zeros_like(deep)
    for width in (pixels / 120, pixels / 40):
        weight = np.maximum(ndimage.gaussian_filter(known, width), 1e-3)
        dark += np.clip((deep - ndimage.gaussian_filter(deep, width) / weight) / (2.0 * width), 0, 1)
    return torch.from_numpy(1 - 0.38 * np.clip(dark, 0, 1.4)).flatten()

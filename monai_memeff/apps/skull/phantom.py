"""Generated head CTs with known anatomy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

HEAD_LABELS = {"soft tissue": 1, "brain": 2, "fluid": 3, "skull": 4, "jaw": 5, "spine": 6, "eyes": 7}
AIR, FAT, SKIN, MUSCLE, FLUID = -1000.0, -90.0, 30.0, 55.0, 8.0
CORTICAL, DIPLOE, TOOTH = 1250.0, 560.0, 2200.0
FIELD_MM = 150.0  # half edge of the cube over which the smooth random fields are drawn

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Phantom:
    """A generated CT.

    Attributes:
        image: float32 (H, W, D), whole Hounsfield units.
        labels: int16 (H, W, D); 0 is air outside and inside the body.
        affine: float64 (4, 4), voxel index -> millimeters (RAS+): the axes run right, to the front and up.
        names: name of each label.
    """

    image: torch.Tensor
    labels: torch.Tensor
    affine: torch.Tensor
    names: dict[str, int]


class Canvas:
    """A volume in millimeters on which simple solids are painted, each inside its own box."""

    def __init__(self, shape: Sequence[int], spacing: float | Sequence[float], center: Point, seed: int) -> None:
        steps = [float(spacing)] * 3 if isinstance(spacing, int | float) else [float(s) for s in spacing]
        if len(shape) != 3 or len(steps) != 3 or min(shape) < 1 or min(steps) <= 0:
            raise ValueError(f"shape and spacing need three positive numbers each, got {tuple(shape)} and {steps}")
        self.generator = torch.Generator().manual_seed(int(seed))
        self.affine = torch.diag(torch.tensor([*steps, 1.0], dtype=torch.float64))
        self.axes = []
        for a, (n, step, middle) in enumerate(zip(shape, steps, center, strict=True)):
            self.affine[a, 3] = middle - step * (n - 1) / 2
            self.axes.append((torch.arange(n, dtype=torch.float64) * step + self.affine[a, 3]).float())
        self.image = torch.full(tuple(shape), AIR)
        self.labels = torch.zeros(tuple(shape), dtype=torch.int16)

    def uniform(self, low: float, high: float) -> float:
        """One random number; drawn as an integer, so that it is the same everywhere."""
        return low + (high - low) * int(torch.randint(0, 1 << 16, (1,), generator=self.generator)) / (1 << 16)

    def grid(self, box: tuple[slice, ...] = (slice(None),) * 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Millimeters of the voxel centers of a box, as three tensors that broadcast."""
        x, y, z = (axis[part] for axis, part in zip(self.axes, box, strict=True))
        return x[:, None, None], y[None, :, None], z[None, None, :]

    def box(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, ...]:
        """The voxels between two corners in millimeters."""
        cuts = []
        for axis, a, b in zip(self.axes, low, high, strict=True):
            ends = torch.searchsorted(axis, torch.tensor([a, b]))
            cuts.append(slice(int(ends[0]), int(ends[1])))
        return tuple(cuts)

    def field(self, knots: int) -> torch.Tensor:
        """A smooth random field in about [-1, 1], fixed in millimeters: cubic B-splines on a coarse grid of knots."""
        values = torch.randint(-1000, 1001, (knots,) * 3, generator=self.generator).float() * 0.0018
        for axis in self.axes:
            place = (axis / FIELD_MM + 1) / 2 * (knots - 1)
            far = (place[:, None] - torch.arange(knots)[None]).abs()
            near = 2 / 3 - far**2 + far**3 / 2
            weights = torch.where(far < 1, near, (2 - far).clamp(min=0) ** 3 / 6)
            values = torch.tensordot(values, weights, dims=([0], [1]))
        return values

    def paint(self, mask: torch.Tensor, value: float, label: int, box: tuple[slice, ...] = (slice(None),) * 3) -> None:
        """Give the voxels of a mask one value and label."""
        self.image[box].masked_fill_(mask, value)
        self.labels[box].masked_fill_(mask, label)

    def ellipsoid(self, center: Point, radii: Point, value: float, label: int) -> None:
        """Paint an ellipsoid."""
        span = list(zip(center, radii, strict=True))
        box = self.box([c - r for c, r in span], [c + r for c, r in span])
        x, y, z = (((g - c) / r) ** 2 for g, (c, r) in zip(self.grid(box), span, strict=True))
        mask = x + y + z <= 1
        self.paint(mask, value, label, box)

    def tube(self, points: Sequence[Point], radius: float, value: float, label: int) -> None:
        """Paint round-ended cylinders along a line of points."""
        for p, q in pairwise(points):
            low = [min(a, b) - radius for a, b in zip(p, q, strict=True)]
            box = self.box(low, [max(a, b) + radius for a, b in zip(p, q, strict=True)])
            along = [b - a for a, b in zip(p, q, strict=True)]
            offset = [g - a for g, a in zip(self.grid(box), p, strict=True)]
            length = max(sum(a * a for a in along), 1e-6)
            t = (sum(o * a for o, a in zip(offset, along, strict=True)) / length).clamp(0, 1)
            mask = sum((o - t * a) ** 2 for o, a in zip(offset, along, strict=True)) <= radius**2
            self.paint(mask, value, label, box)

    def finish(self, noise: float, names: dict[str, int]) -> Phantom:
        """Blur by a scanner's half voxel, add noise, round to whole Hounsfield units."""
        image = self.image
        for axis in range(3):
            ends = [image.narrow(axis, 0, 1), image, image.narrow(axis, image.shape[axis] - 1, 1)]
            padded, n = torch.cat(ends, dim=axis), image.shape[axis]
            image = 0.7 * image + 0.15 * (padded.narrow(axis, 0, n) + padded.narrow(axis, 2, n))
        for _ in range(3):  # a sum of whole random numbers: near a normal law, and the same on every machine
            image += torch.randint(-100, 101, image.shape, generator=self.generator, dtype=torch.int16) * (noise / 100)
        return Phantom(image.round_().clamp_(-1024, 3071), self.labels, self.affine, dict(names))


def head_phantom(
    shape: Sequence[int] = (184, 224, 240), spacing: float | Sequence[float] = 1.0, seed: int = 0, noise: float = 12.0
) -> Phantom:
    """A head as a CT scanner sees it: skull, brain, eyes, sinuses, jaw with teeth, neck with spine, scalp.

    The skull has two tables with diploe between, a thickness that varies from about 3 to 9 mm, openings in its base,
    orbits, and no symmetry: left and right differ by a twist, by smooth random fields and in their sinuses.

    Args:
        shape: voxels (H, W, D); the field of view, not the head, grows with it.
        spacing: millimeters per voxel, one number or one per axis.
        seed: another seed is another head.
        noise: strength of the noise in Hounsfield units.

    Returns:
        The head; labels as in ``HEAD_LABELS``, affine in RAS+ with its origin inside the brain.

    Raises:
        ValueError: when shape or spacing are not three positive numbers.
    """
    canvas = Canvas(shape, spacing, (0.0, 3.0, -20.0), seed)
    _neck_and_face(canvas)
    _cranium(canvas)
    _base_openings(canvas)
    _facial_bones(canvas)
    _jaw(canvas)
    return canvas.finish(noise, HEAD_LABELS)


def _neck_and_face(c: Canvas) -> None:
    """Soft tissue below the skull, the spine and the airway."""
    for inset, value in ((0.0, FAT), (4.0, MUSCLE)):
        c.tube([(0, -18, -62), (2, -22, -200)], 57 - inset, value, 1)
        c.ellipsoid((0, 42, -62), (60 - inset, 58 - inset, 66 - inset), value, 1)
    c.ellipsoid((1, 102, -48), (13, 13, 20), SKIN, 1)
    for level in range(7):
        z = -66.0 - 19 * level
        shift = 0.6 * level
        c.ellipsoid((shift, -26, z), (14, 11, 8), CORTICAL, 6)
        c.ellipsoid((shift, -26, z), (11, 8, 6), 320.0, 6)
        c.tube([(shift - 15, -38, z), (shift, -62, z - 4), (shift + 15, -37, z)], 3.5, 700.0, 6)
        for side in (-1, 1):
            c.tube([(shift + side * 14, -28, z), (shift + side * 15, -37.5, z)], 5, 600.0, 6)
    c.tube([(0, 22, -72), (1, 14, -100), (2, 16, -200)], 9, AIR, 0)


def _cranium(c: Canvas) -> None:
    """Scalp, the two tables of the vault with diploe between, fluid, brain and ventricles."""
    x, y, z = c.grid()
    twist, lean = c.uniform(0.01, 0.03), c.uniform(1.0, 2.5)
    width = 68.0 - 3.5 * (y / 90).clamp(-1, 1) - 2.0 * (y / 90).clamp(-1, 1) ** 2
    u, v = x + twist * y - lean * (z / 80), y - twist * x
    back, below = torch.where(v < 0, 92.0, 88.0), torch.where(z < 0, 56.0, 84.0)
    r = ((u / width) ** 2 + (v / back) ** 2 + (z / below) ** 2).sqrt().clamp(min=1e-3)
    slope = ((u / width**2) ** 2 + (v / back**2) ** 2 + (z / below**2) ** 2).sqrt().clamp(min=1e-4)
    bumps = c.field(6)
    depth = 2.5 * bumps - (r - 1) * r / slope  # millimeters below the outer table
    rise = 1 / (1 + ((u.abs() - 66) / 12) ** 2 + ((y - 15) / 25) ** 2 + ((z + 5) / 22) ** 2)
    bun = 1 / (1 + (u / 25) ** 2 + ((y + 92) / 18) ** 2 + ((z + 8) / 15) ** 2)
    thick = 6.2 + 1.6 * c.field(8) - 2.6 * rise + 4.0 * bun + torch.where(z > 60, 0.8, 0.0)
    c.paint((depth > -6.5) & (z > -60), SKIN, 1)
    c.paint((depth > -4.5) & (z > -60), FAT, 1)
    c.paint(depth > 0, CORTICAL, 4)
    spongy = (depth > 1.5) & (depth < thick - 1.4)
    c.paint(spongy, DIPLOE, 4)
    c.image[spongy] += 120 * c.field(24)[spongy]
    c.paint(depth > thick, FLUID, 3)
    c.paint(depth > thick + 2.5 + bumps, 34.0, 2)
    c.paint(depth > thick + 7.0 + 3 * bumps, 29.0, 2)
    for side in (-1, 1):
        horn = [(side * 13, 28, 18), (side * 11, 0, 24), (side * 18, -30, 16), (side * 26, -12, -4)]
        c.tube(horn, 4.5 + 0.6 * side, FLUID, 3)


def _base_openings(c: Canvas) -> None:
    """Foramina, petrous bones, mastoids and the inside of the base."""
    for side in (-1, 1):
        far = 1.5 * side
        c.tube([(side * 56 + far, -22, -42), (side * 22 + far, 8, -38)], 8, 1100.0, 4)
        c.ellipsoid((side * 57, -30 + far, -55), (11, 13, 19 + far), 900.0, 4)
        c.ellipsoid((side * 57, -30 + far, -56), (7, 9, 14), -350.0, 4)
        c.ellipsoid((side * 63, -8, -42), (9, 4, 4), AIR, 0)
        c.ellipsoid((side * 28, -22 + far, -50), (6, 5, 9), MUSCLE, 1)
        c.ellipsoid((side * 24, 16, -50), (4.5, 3.5, 9), MUSCLE, 1)
    c.ellipsoid((1.0, -36.0, -52.0), (15, 18, 16), 34.0, 2)


def _facial_bones(c: Canvas) -> None:
    """Orbits with eyes, nose, sinuses, cheek bones and upper jaw."""
    c.ellipsoid((0, 62, -62), (33, 28, 24), 800.0, 4)
    for side in (-1, 1):
        c.tube([(side * 36, 80, -44), (side * 54, 56, -44)], 7, 1000.0, 4)
        c.tube([(side * 54, 56, -42), (side * 67, 25, -41), (side * 63, -6, -40)], 3.4, CORTICAL, 4)
        c.tube([(side * 53, 60, -42), (side * 55, 62, -16)], 4.5, CORTICAL, 4)
        c.ellipsoid((side * 32, 66, -24), (22, 30, 20), CORTICAL, 4)
        c.ellipsoid((side * 32, 69, -24), (19.5, 29, 17.5), FAT, 1)
        c.ellipsoid((side * 32.5, 80, -24), (12, 12, 12), 18.0, 7)
        c.tube([(side * 29, 68, -24), (side * 12, 35, -20)], 2.5, MUSCLE, 1)
        c.ellipsoid((side * 27, 58, -58), (13 + side, 16, 15 - side), AIR, 0)
        c.ellipsoid((side * 13 + 3, 84, -2), (9 + 3 * side, 4, 11 + 2 * side), AIR, 0)
    c.ellipsoid((0, 66, -48), (13, 34, 22), AIR, 0)
    c.tube([(0.5, 50, -36), (2.0, 70, -38), (1.0, 84, -52)], 2.0, 500.0, 4)
    c.tube([(0, 92, -26), (0.5, 97, -36)], 4.5, CORTICAL, 4)


def _jaw(c: Canvas) -> None:
    """Mandible and two rows of teeth."""
    half: list[Point] = [(46, 22, -98), (38, 53, -106), (20, 78, -110), (0, 86, -111)]
    arch = [(-x, y, z) for x, y, z in half[:-1]] + half[::-1]
    for side, end in ((-1, arch[0]), (1, arch[-1])):
        c.tube([end, (side * 51, 8, -72), (side * 52, 2, -52)], 5.5, CORTICAL, 5)
        c.tube([(side * 50, 14, -76), (side * 49, 28, -58)], 3.5, CORTICAL, 5)
    c.tube(arch, 9, CORTICAL, 5)
    c.tube(arch, 6, 420.0, 5)
    for tooth in (*range(-7, 5), 6, 7):  # one is missing on the right
        x, y = 4.1 * tooth, 84 - 0.72 * tooth * tooth
        c.tube([(x, y - 2, -78), (x, y, -89)], 2.6, TOOTH, 5)
        c.tube([(x * 0.97, y - 3, -106), (x * 0.97, y - 2, -93)], 2.5, TOOTH, 5)

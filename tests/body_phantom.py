"""Generated body CTs with a label for every organ."""

from __future__ import annotations

from collections.abc import Sequence

from monai_memeff.apps.skull.phantom import FAT, MUSCLE, SKIN, Canvas, Phantom, Point

BODY_LABELS = {
    "soft tissue": 1, "bone": 2, "lungs": 3, "heart": 4, "liver": 5, "spleen": 6, "left kidney": 7, "right kidney": 8,
    "stomach": 9, "aorta": 10, "bladder": 11, "pancreas": 12,
}  # fmt: skip


def body_phantom(
    shape: Sequence[int] = (112, 80, 120), spacing: float | Sequence[float] = 3.5, seed: int = 0, noise: float = 12.0
) -> Phantom:
    """A trunk as a CT scanner sees it, with a label for every organ.

    Args:
        shape: voxels (H, W, D); the field of view, not the body, grows with it.
        spacing: millimeters per voxel, one number or one per axis.
        seed: another seed moves and scales the organs.
        noise: strength of the noise in Hounsfield units.

    Returns:
        The body; labels as in ``BODY_LABELS``, affine in RAS+ with its origin between the kidneys.

    Raises:
        ValueError: when shape or spacing are not three positive numbers.
    """
    c = Canvas(shape, spacing, (0.0, 0.0, 30.0), seed)
    x, y, z = c.grid()
    girth = 1 + 0.05 * c.field(5)
    for inset, value in ((0.0, SKIN), (3.0, FAT), (16.0, MUSCLE)):
        c.paint((x / (165 - inset)) ** 2 + ((y + 8) / (108 - inset)) ** 2 + 0 * z <= girth, value, 1)
    _organs(c)
    _trunk_bones(c)
    return c.finish(noise, BODY_LABELS)


def _organs(c: Canvas) -> None:
    """Organs as ellipsoids that a seed moves by up to 5 mm and scales by up to 8 %."""
    table: tuple[tuple[Point, Point, float, int], ...] = (
        ((-70, 0, 130), (52, 70, 95), -820.0, 3), ((66, -2, 132), (56, 72, 98), -830.0, 3),
        ((60, 12, 22), (72, 62, 52), 105.0, 5), ((28, 28, 10), (60, 38, 30), 105.0, 5),
        ((-88, -32, 22), (28, 36, 42), 115.0, 6), ((-18, 28, 98), (46, 42, 48), 150.0, 4),
        ((-52, 30, 10), (34, 30, 46), 40.0, 9), ((-50, 42, 26), (24, 14, 20), -950.0, 9),
        ((-56, -48, -18), (24, 21, 46), 180.0, 7), ((58, -50, -32), (25, 21, 44), 180.0, 8),
        ((2, 40, -138), (36, 30, 26), 12.0, 11), ((-10, 6, -4), (44, 11, 12), 80.0, 12),
    )  # fmt: skip
    for center, radii, value, label in table:
        grow = c.uniform(0.92, 1.08)
        moved = tuple(p + c.uniform(-5, 5) for p in center)
        c.ellipsoid((moved[0], moved[1], moved[2]), (radii[0] * grow, radii[1] * grow, radii[2] * grow), value, label)
    aorta: list[Point] = [(-4, 10, 130), (-6, -4, 158), (-14, -34, 150), (-12, -38, 60), (-7, -28, -40), (-4, -26, -70)]
    c.tube(aorta, 11, 220.0, 10)


def _trunk_bones(c: Canvas) -> None:
    """Spine, ribs and pelvis."""
    for level in range(14):
        z = -140.0 + 27 * level
        c.ellipsoid((0, -58, z), (21, 17, 12), 700.0, 2)
        c.ellipsoid((0, -58, z), (18, 14, 10), 230.0, 2)
        c.tube([(0, -84, z), (0, -98, z - 8)], 4, 600.0, 2)
    for side in (-1, 1):
        for rib in range(9):
            z, wide = 200.0 - 21 * rib, 104 + 4.0 * min(rib, 6)
            line: list[Point] = [(side * 22, -66, z), (side * wide * 0.75, -72, z - 8), (side * wide, -10, z - 26)]
            line += [(side * wide * 0.8, 58, z - 44), (side * 30, 84, z - 40)]
            c.tube(line[: 5 if rib < 6 else 4], 4.5, 620.0, 2)
        c.tube([(side * 30, -70, -118), (side * 92, -30, -96), (side * 98, 20, -112)], 9, 550.0, 2)

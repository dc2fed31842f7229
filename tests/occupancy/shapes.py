"""Analytic shapes as networks that answer points, and their dense evaluation, for the tests of the octree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Coordinates (i, j, k), of any shapes that broadcast, -> integer labels."""


class Points:
    """A network that answers points by an analytic shape, and remembers what it was queried.

    Args:
        shape: the labels.
        channels: K; one is the sign of the logit, more are classes.
        coarse: what ``coarse_logits`` gives, (1, K, h, w, d) or None.
    """

    def __init__(self, shape: Shape, channels: int = 1, coarse: Tensor | None = None) -> None:
        self.shape, self.channels, self.coarse = shape, channels, coarse
        self.passes: list[Tensor] = []
        self.encoded: list[Tensor] = []

    def encode(self, volume: Tensor) -> float:
        """The latent is the volume's mean."""
        self.encoded.append(volume)
        return float(volume.mean())

    def query(self, latent: float, points: Tensor, volume: Tensor) -> Tensor:
        """Logits (1, N, K); their size varies from point to point."""
        assert float(volume.mean()) == latent
        self.passes.append(points[0])
        labels = self.shape(*points.unbind(-1)).expand(points.shape[:-1]).long()
        size = 1 + points.sum(-1, keepdim=True) % 7
        if self.channels == 1:
            return size * (2.0 * labels[..., None] - 1)
        return size * torch.nn.functional.one_hot(labels, self.channels)

    def coarse_logits(self, latent: float) -> Tensor | None:
        """Coarse prediction."""
        return self.coarse

    @property
    def queried(self) -> Tensor:
        """All points so far, (N, 3)."""
        return torch.cat(self.passes)

    def queried_mask(self, extents: Sequence[int]) -> Tensor:
        """Where voxels were queried, bool."""
        mask = torch.zeros(tuple(extents), dtype=torch.bool)
        mask[self.queried.long().unbind(-1)] = True
        return mask


def dense(shape: Shape, extents: Sequence[int]) -> Tensor:
    """Labels (H, W, D), uint8, computed slab by slab with the arithmetic of single points."""
    result = torch.empty(tuple(extents), dtype=torch.uint8)
    h, w, d = (torch.arange(n, dtype=torch.float32) for n in extents)
    for start in range(0, len(h), 16):
        result[start : start + 16] = shape(h[start : start + 16, None, None], w[:, None], d)
    return result


def ellipsoid(center: Sequence[float], radii: Sequence[float] | float) -> Shape:
    """1 inside."""
    r = (radii,) * 3 if isinstance(radii, (int, float)) else radii
    return lambda *at: (_distance(at, center, r) <= 1).byte()


def shell(center: Sequence[float], radius: float, thickness: float) -> Shape:
    """1 within half the thickness of a sphere's surface."""
    return lambda *at: ((_distance(at, center, (1, 1, 1)).sqrt() - radius).abs() <= thickness / 2).byte()


def box(low: Sequence[float], high: Sequence[float]) -> Shape:
    """1 from low to high, both inclusive."""

    def labels(*at: Tensor) -> Tensor:
        inside = [(x >= a) & (x <= b) for x, a, b in zip(at, low, high, strict=True)]
        return (inside[0] & inside[1] & inside[2]).byte()

    return labels


def helix(center: Sequence[float], radius: float, pitch: float, thickness: float) -> Shape:
    """1 within half the thickness of a spiral around the third axis: one long thin piece."""

    def labels(i: Tensor, j: Tensor, k: Tensor) -> Tensor:
        turn = 2 * torch.pi * (k - center[2]) / pitch
        x, y = i - center[0] - radius * turn.cos(), j - center[1] - radius * turn.sin()
        return (x * x + y * y <= thickness**2 / 4).byte()

    return labels


def painted(*shapes: Shape) -> Shape:
    """Class n + 1 where the n-th shape is; later shapes cover earlier ones."""

    def labels(*at: Tensor) -> Tensor:
        result = torch.zeros((), dtype=torch.uint8)
        for number, shape in enumerate(shapes):
            result = torch.where(shape(*at) > 0, torch.tensor(number + 1, dtype=torch.uint8), result)
        return result

    return labels


def union(*shapes: Shape) -> Shape:
    """1 where any shape is."""
    return lambda *at: (painted(*shapes)(*at) > 0).byte()


def stored(labels: Tensor) -> Shape:
    """Labels (H, W, D) as a shape."""
    return lambda *at: labels[tuple(x.long() for x in at)]


def _distance(at: Sequence[Tensor], center: Sequence[float], radii: Sequence[float]) -> Tensor:
    """Squared distance in units of the radii; the axes in a fixed order, so that broadcasting changes no bit."""
    i, j, k = (((x - c) / r) ** 2 for x, c, r in zip(at, center, radii, strict=True))
    return i + j + k

"""What the octree keeps while a network is queried: measured along the border of a mask, or bounded around balls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from monai_memeff.memory.meter import measure_peak
from monai_memeff.occupancy.inferer import OctreeInferer
from monai_memeff.occupancy.octree import default_stride

SMALL = (64, 96)
"""Longest extents of the volumes on which balls are measured; up to the larger one the volume itself."""

WIDEST = 0.9
"""Diameter of the largest ball, as a share of the volume's extents."""

RULE = (
    f"an upper bound for boundaries no longer than those of nested balls up to {WIDEST:.0%} as wide as the volume, with"
    " every pass full of points"
)


class Pass(NamedTuple):
    """One call of the network: bytes that the octree keeps meanwhile, and points."""

    waiting: int
    points: int


class OctreeCost(NamedTuple):
    """The octree of one volume.

    Attributes:
        peak_bytes: its own bytes at most, the result included.
        passes: calls of the network, of which none has both fewer points and fewer bytes waiting than another.
        queried: points in all.
        kept: bytes that stay of a point.
    """

    peak_bytes: int
    passes: tuple[Pass, ...]
    queried: int
    kept: int

    def smaller(self, points_per_pass: int) -> OctreeCost:
        """The same with fewer points in a pass: what the earlier ones of a call leave lies there meanwhile."""
        more = (max(0, one.points - points_per_pass) for one in self.passes)
        parts = [
            Pass(one.waiting + rest * self.kept, one.points - rest) for one, rest in zip(self.passes, more, strict=True)
        ]
        return self._replace(passes=_largest(parts))


class Answers(NamedTuple):
    """What a network says of a point, and of how many at once.

    Attributes:
        classes: logits of a point.
        dtype: their type.
        points_per_pass: most points of a call.
    """

    classes: int
    dtype: torch.dtype
    points_per_pass: int

    @property
    def kept(self) -> int:
        """Bytes that stay of a point: its number, its logits and their label, itself and as one that was wrong."""
        return 2 * torch.int64.itemsize + self.classes * self.dtype.itemsize + 1

    def result_bytes(self, voxels: int, queried: int) -> int:
        """The result with the octree's labels and flags, and a mask of one class, and what was queried."""
        whole = 2 + torch.float32.itemsize * self.classes + (self.classes > 1)
        return voxels * whole + queried * (torch.int64.itemsize + self.classes * self.dtype.itemsize)

    def of(self, labels: Tensor) -> Tensor:
        """Logits (1, N, K) of labels (1, N, 1)."""
        if self.classes == 1:
            return labels.to(self.dtype) - 0.5
        return -(torch.arange(self.classes) - labels).abs().to(self.dtype)


def along_a_mask(mask: Tensor, answers: Answers) -> OctreeCost:
    """The octree of a volume whose labels are 1 in a mask and 0 elsewhere, as measured.

    Args:
        mask: bool (H, W, D).
        answers: What the network says.
    """
    flat, (_, width, depth) = mask.reshape(-1), mask.shape

    def labels(points: Tensor) -> Tensor:
        i, j, k = points.long().unbind(-1)
        return flat[(i * width + j) * depth + k][..., None].float()

    return _measured(mask.shape, default_stride(mask.shape), labels, answers)


def around_balls(extents: Sequence[int], answers: Answers) -> OctreeCost:
    """The octree around nested balls (:data:`RULE`): measured where the volume is small, else extended from two.

    Args:
        extents: Extents of the volume (H, W, D).
        answers: What the network says; every class has a ball, two or fewer have one ball inside the other.
    """
    largest, stride = max(extents), default_stride(extents)
    if largest <= max(SMALL):
        return _full(_balls(extents, stride, answers), extents, answers)
    small = [tuple(max(1, round(n * longest / largest)) for n in extents) for longest in SMALL]
    voxels = [math.prod(shape) for shape in small]
    costs = [_balls(shape, stride, answers) for shape in small]

    def whole(number: Callable[[OctreeCost], int]) -> int:
        return _extended(voxels, [number(cost) for cost in costs], math.prod(extents))

    waiting = Pass(whole(_waiting), 0)
    queried = whole(lambda c: c.queried)
    peak = max(whole(lambda c: c.peak_bytes), answers.result_bytes(math.prod(extents), queried))
    return _full(OctreeCost(peak, (waiting,), queried, answers.kept), extents, answers)


def _full(cost: OctreeCost, extents: Sequence[int], answers: Answers) -> OctreeCost:
    """Every pass full of points, of which there are no more than voxels."""
    return cost._replace(passes=(Pass(_waiting(cost), min(answers.points_per_pass, math.prod(extents))),))


def _waiting(cost: OctreeCost) -> int:
    return max(one.waiting for one in cost.passes)


def _extended(voxels: Sequence[int], values: Sequence[int], whole: int) -> int:
    """A share of the volume and a share of its surface, which two sizes tell apart."""
    (v0, v1), (y0, y1) = voxels, values
    s0, s1 = v0 ** (2 / 3), v1 ** (2 / 3)
    determinant = v0 * s1 - v1 * s0
    of_volume, of_surface = (y0 * s1 - y1 * s0) / determinant, (v0 * y1 - v1 * y0) / determinant
    return max(y1, round(of_volume * whole + of_surface * whole ** (2 / 3)))


def _balls(extents: Sequence[int], stride: Sequence[int], answers: Answers) -> OctreeCost:
    last = torch.tensor([max(1, n - 1) for n in extents], dtype=torch.float32)
    count = max(2, answers.classes - 1)

    def labels(points: Tensor) -> Tensor:
        radius = (2 * points / last - 1).norm(dim=-1, keepdim=True)
        return (count * (1 - radius / WIDEST)).ceil().clamp(0, count) % max(2, answers.classes)

    return _measured(extents, stride, labels, answers)


def _measured(
    extents: Sequence[int], stride: Sequence[int], labels: Callable[[Tensor], Tensor], answers: Answers
) -> OctreeCost:
    """The octree of a function of points, run for real."""
    passes: list[Pass] = []
    volume, meter = torch.zeros(1).expand(1, 1, *extents), measure_peak("cpu")

    def answer(points: Tensor) -> Tensor:
        passes.append(Pass(meter.live_bytes - points.nbytes, points.shape[1]))
        return answers.of(labels(points))

    with meter:
        OctreeInferer(points_per_pass=answers.points_per_pass, stride=tuple(stride))(volume, answer)
    return OctreeCost(meter.peak_bytes, _largest(passes), sum(one.points for one in passes), answers.kept)


def _largest(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Those than which no other has both more points and more bytes waiting."""
    kept: list[Pass] = []
    for one in sorted(set(passes), reverse=True):
        if not kept or one.points > kept[-1].points:
            kept.append(one)
    return tuple(kept)

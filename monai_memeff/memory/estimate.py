"""Predict the peak of a step before running it: measure it on small volumes, extend the line, choose what fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from monai_memeff.arguments import numbers_checked
from monai_memeff.memory.meter import measure_peak


@dataclass(frozen=True)
class PeakEstimate:
    """Peak bytes as a line over the number of voxels: ``fixed_bytes + bytes_per_voxel * voxels``.

    Args:
        fixed_bytes: what does not grow with the volume, such as gradients and the optimizer's state.
        bytes_per_voxel: what every voxel of the input volume costs.
        worst_error: largest deviation of a measured peak from the line, as a fraction of that peak; 0 if only two sizes
            were measured, since two points always lie on a line.

    Examples:
        >>> line = PeakEstimate(fixed_bytes=1e6, bytes_per_voxel=500.0)
        >>> line.peak_bytes((32, 32, 32)), line.largest_cube(budget_bytes=1e9, multiple=16)
        (17384000, 112)
    """

    fixed_bytes: float
    bytes_per_voxel: float
    worst_error: float = 0.0

    def peak_bytes(self, spatial_shape: Sequence[int]) -> int:
        """Predicted peak in bytes for a volume of ``spatial_shape`` voxels."""
        return max(0, round(self.fixed_bytes + self.bytes_per_voxel * math.prod(spatial_shape)))

    def fits(self, spatial_shape: Sequence[int], budget_bytes: float) -> bool:
        """Whether the predicted peak for ``spatial_shape`` is at most ``budget_bytes``."""
        return self.peak_bytes(spatial_shape) <= budget_bytes

    def largest_cube(self, budget_bytes: float, multiple: int = 1) -> int:
        """Edge in voxels of the largest cube that fits a budget.

        Args:
            budget_bytes: bytes the step may take above what was alive before its first run.
            multiple: the edge is a multiple of it; the network's total stride.

        Raises:
            ValueError: not even ``multiple`` voxels fit, or the peak does not grow with the volume.
        """
        if self.bytes_per_voxel <= 0:
            raise ValueError(
                f"The peak does not grow with the volume ({self.bytes_per_voxel:.3g} bytes per voxel), so no largest "
                "cube exists; measure at sizes further apart."
            )
        voxels = max(0.0, budget_bytes - self.fixed_bytes) / self.bytes_per_voxel
        edge = (round(voxels ** (1 / 3)) + 1) // multiple * multiple
        while edge > 0 and not self.fits((edge,) * 3, budget_bytes):
            edge -= multiple
        if edge < 1:
            raise ValueError(
                f"A budget of {budget_bytes:.4g} bytes holds no cube of {multiple} voxels, which takes "
                f"{self.peak_bytes((multiple,) * 3):.4g}; raise the budget or make the network smaller."
            )
        return edge


@numbers_checked
def estimate_peak(
    step: Callable[[tuple[int, ...]], Any],
    spatial_shapes: Sequence[Sequence[int]],
    device: str | torch.device | None = None,
) -> PeakEstimate:
    """Measure a step on small volumes and fit a line through the peaks.

    Convolutional networks follow the line closely when every size is a multiple of the total stride; attention over
    all voxels does not. A third size shows how well the line holds (``worst_error``). The step runs once on the first
    size unmeasured, so that gradients and the optimizer's state exist; they are counted all the same, in
    ``fixed_bytes``. The network's parameters are not, since they are alive before.

    Args:
        step: runs one step (training or inference) for a volume of the spatial shape it is given; it makes the volume.
        spatial_shapes: two or more shapes with different numbers of voxels, for example ``[(32,) * 3, (48,) * 3]``.
        device: Device, as in :func:`~monai_memeff.memory.measure_peak`.

    Returns:
        The line.

    Raises:
        ValueError: fewer than two sizes, or all of the same number of voxels.

    Examples:
        >>> network = torch.nn.Conv3d(1, 4, 3, padding=1)
        >>> line = estimate_peak(lambda shape: network(torch.rand(1, 1, *shape)), [(4, 4, 4), (8, 8, 8)])
        >>> line.bytes_per_voxel
        20.0
    """
    shapes = [tuple(shape) for shape in spatial_shapes]
    voxels = [math.prod(shape) for shape in shapes]
    if len(set(voxels)) < 2:
        raise ValueError(f"Give at least two shapes that differ in their number of voxels, got {shapes}.")
    peaks = []
    with measure_peak(device) as since_the_start:
        step(shapes[0])
        for shape in shapes:
            level = since_the_start.live_bytes
            with measure_peak(device) as meter:
                step(shape)
            peaks.append(level + meter.peak_bytes)
    return line_through(voxels, peaks)


def line_through(voxels: Sequence[int], peaks: Sequence[int]) -> PeakEstimate:
    """The line of least squares through peaks over numbers of voxels."""
    center, level = sum(voxels) / len(voxels), sum(peaks) / len(peaks)
    spread = sum((v - center) ** 2 for v in voxels)
    slope = sum((v - center) * (p - level) for v, p in zip(voxels, peaks, strict=True)) / spread
    fixed = level - slope * center
    errors = [abs(fixed + slope * v - p) / p for v, p in zip(voxels, peaks, strict=True) if p > 0]
    return PeakEstimate(fixed, slope, max(errors, default=0.0) if len(voxels) > 2 else 0.0)

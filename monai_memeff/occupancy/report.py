"""OctreeReport: what one call of the octree queried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class OctreeReport:
    """What one call queried; counts are sums over the batch.

    Attributes:
        num_queries: points that the network answered, none of them twice.
        voxels: voxels of the batch.
        levels: strides in voxels per axis, coarsest first.
        points_per_level: queries at each of them, the coarsest grid included.
        rounds: passes of front propagation at each level (the longest of the batch) with queries.
        initial: "network" or "grid", the one that was used; "grid and network" where volumes of a batch differ.
        disagreement: voxels whose label is not that of dense evaluation; None unless compared.
        seconds: wall time, without the comparison.

    Examples:
        >>> inferer = OctreeInferer(stride=8)
        >>> _ = inferer(torch.zeros(1, 1, 17, 17, 17), lambda points: points[..., :1] - 4.5)
        >>> inferer.last_report.levels, inferer.last_report.voxels
        (((8, 8, 8), (4, 4, 4), (2, 2, 2), (1, 1, 1)), 4913)
    """

    num_queries: int
    voxels: int
    levels: tuple[tuple[int, ...], ...]
    points_per_level: tuple[int, ...]
    rounds: tuple[int, ...]
    initial: str
    disagreement: int | None
    seconds: float

    @property
    def fraction(self) -> float:
        """Queries per voxel."""
        return self.num_queries / self.voxels


def summed(reports: Sequence[OctreeReport]) -> OctreeReport:
    """One report of a batch; its items have the same levels."""
    wrong = [report.disagreement for report in reports if report.disagreement is not None]
    return replace(
        reports[0],
        initial=" and ".join(sorted({report.initial for report in reports})),
        num_queries=sum(report.num_queries for report in reports),
        voxels=sum(report.voxels for report in reports),
        points_per_level=tuple(map(sum, zip(*(report.points_per_level for report in reports), strict=True))),
        rounds=tuple(map(max, zip(*(report.rounds for report in reports), strict=True))),
        disagreement=sum(wrong) if wrong else None,
        seconds=sum(report.seconds for report in reports),
    )

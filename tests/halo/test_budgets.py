"""Twelve networks within three budgets, by the inferer: measured within 10 % of the plan and never above the budget."""

from __future__ import annotations

import pytest

from monai_memeff.halo import SpatialPartitionInferer, plan
from tests.halo.matrix import ENTRIES

NETWORKS = [
    "UNet instance", "UNet batch", "UNet 5^3 kernels, GELU", "BasicUNet", "DynUNet", "AttentionUnet", "SegResNet",
    "HighResNet", "PlainConvUNet", "ResidualEncoderUNet anisotropic", "LinkNet, stem of stride 4", "VoxelMorphUNet",
]  # fmt: skip
SHARES = (0.8, 0.5, 0.3)  # of the peak with one tile for each step


CHOSEN = [pytest.param(n, marks=[] if i < 2 else pytest.mark.slow) for i, n in enumerate(NETWORKS)]


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.long
def test_measured_peaks_are_the_planned_ones(name: str) -> None:
    network, args = ENTRIES[name].network().float(), tuple(a.float() for a in ENTRIES[name].arguments())
    most, least = (plan(network, args, partitions=p).peak_bytes for p in (1, 10_000))
    for share in SHARES:
        budget = max(int(share * most), least)
        inferer = SpatialPartitionInferer(memory_budget=budget)
        inferer(args[0], network, *args[1:])
        report = inferer.last_report
        assert report is not None
        assert report.device_peak_bytes <= report.planned_peak_bytes <= budget
        assert report.device_peak_bytes >= 0.9 * report.planned_peak_bytes, (share, report)

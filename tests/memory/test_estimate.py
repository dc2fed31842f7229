"""Predicted peaks against peaks that were measured afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_memeff.memory import PeakEstimate, estimate_peak, measure_peak


@pytest.mark.slow
def test_a_line_is_found_exactly() -> None:
    def step(shape: tuple[int, ...]) -> None:
        kept = torch.zeros(500, dtype=torch.uint8), torch.zeros(*shape, 12, dtype=torch.uint8)
        del kept

    line = estimate_peak(step, [(2, 2, 2), (3, 4, 5)])
    assert line.fixed_bytes == pytest.approx(500)
    assert line.bytes_per_voxel == pytest.approx(12)
    assert line.peak_bytes((10, 10, 10)) == 12500
    assert line.fits((10, 10, 10), 12500)
    assert not line.fits((10, 10, 10), 12499)


@pytest.mark.slow
def test_a_curve_is_noticed() -> None:
    def step(shape: tuple[int, ...]) -> None:
        torch.zeros(torch.Size(shape).numel() ** 2, dtype=torch.uint8)

    assert estimate_peak(step, [(2, 2, 2), (4, 4, 4), (6, 6, 6)]).worst_error > 0.1


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.slow
def test_a_training_step_is_predicted(optimizer: type[torch.optim.Optimizer]) -> None:
    """Two cubes of 16 and 24 voxels foretell 40 voxels, gradients and the optimizer's state included."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1),
            nn.InstanceNorm3d(8),
            nn.PReLU(),
            nn.Conv3d(8, 16, 3, 2, 1),
            nn.PReLU(),
            nn.ConvTranspose3d(16, 2, 3, 2, 1, 1),
        )
        return net, optimizer(net.parameters(), lr=1e-3)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, ...]) -> None:
        optimizer.zero_grad()
        net(torch.rand(1, 1, *shape)).square().mean().backward()
        optimizer.step()

    estimated = build()
    line = estimate_peak(lambda shape: step(*estimated, shape), [(16,) * 3, (24,) * 3, (24, 24, 32)])
    fresh = build()
    with measure_peak() as meter:
        for _ in range(2):
            step(*fresh, (40, 40, 32))
    assert line.peak_bytes((40, 40, 32)) == pytest.approx(meter.peak_bytes, rel=0.02)
    assert line.worst_error < 0.02


def test_the_largest_cube_fits_and_the_next_does_not() -> None:
    line = PeakEstimate(1000, 8)
    for budget in (1000 + 8, 5000, 1e6, 2**34):
        edge = line.largest_cube(budget)
        assert line.fits((edge,) * 3, budget)
        assert not line.fits((edge + 1,) * 3, budget)
    assert line.largest_cube(1e6, multiple=16) == 48


def test_budgets_and_sizes_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="holds no cube of 16 voxels, which takes"):
        PeakEstimate(1000, 8).largest_cube(2000, multiple=16)
    with pytest.raises(ValueError, match="does not grow"):
        PeakEstimate(1000, 0).largest_cube(2000)
    with pytest.raises(ValueError, match="differ in their number of voxels"):
        estimate_peak(lambda shape: None, [(2, 3, 4), (4, 3, 2)])

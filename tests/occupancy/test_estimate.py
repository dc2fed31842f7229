"""What estimate_network says of a network of points: exact along a known border, never too low around balls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_memeff.errors import InputError
from monai_memeff.memory import estimate_network, measure_peak
from monai_memeff.occupancy import OccupancyNet
from monai_memeff.occupancy.estimate.boundaries import Answers, along_a_mask, around_balls

SIZES = ((24, 33, 20), (40, 28, 44))


class Labeled(OccupancyNet):
    """An OccupancyNet that computes as always, and then answers with the labels of a volume."""

    truth: Tensor | None = None

    def query(self, latent: Any, points: Tensor, volume: Tensor) -> Tensor:
        """The logits of the labels."""
        logits = super().query(latent, points, volume)
        if self.truth is None:
            return logits
        labels = self.truth[tuple(points[0].long().T)][None, :, None]
        return labels - 0.5 if logits.shape[2] == 1 else -(torch.arange(logits.shape[2]) - labels).abs()


def network(classes: int) -> Labeled:
    torch.manual_seed(0)
    return Labeled(2, classes, channels=(4, 8), width=16, blocks=1).eval()


def radius(size: tuple[int, ...]) -> Tensor:
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    return sum(axis**2 for axis in axes) ** 0.5  # type: ignore[return-value]


SHAPES: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "nothing": lambda size: torch.zeros(size),
    "ball": lambda size: (radius(size) < 0.6).float(),
    "shell": lambda size: ((radius(size) - 0.75).abs() < 0.1).float(),
}


def measured(net: Labeled, truth: Tensor, inferer: Any, batch: int = 1) -> int:
    net.truth = truth
    volume = torch.rand(batch, 2, *truth.shape)
    with torch.no_grad(), measure_peak() as meter:
        inferer(volume, net)
    net.truth = None
    return meter.peak_bytes


@pytest.mark.parametrize(("name", "classes"), [("nothing", 2), ("ball", 1), ("shell", 1), ("shell", 3)])
@pytest.mark.long
def test_the_peak_is_known_along_a_border_and_bounded_without(name: str, classes: int) -> None:
    for batch, size in enumerate(SIZES, 1):
        net, truth = network(classes), SHAPES[name](size)
        shape = (batch, 2, *size)
        exact = estimate_network(net, shape, system="occupancy", image=truth[None, None])
        bound = estimate_network(net, shape, system="occupancy")
        real = measured(net, truth, exact.inferer, batch)
        assert exact.peak_bytes == pytest.approx(real, rel=0.02)
        assert real <= 1.001 * bound.peak_bytes
        assert "an upper bound for boundaries no longer than" in str(bound)
        assert "active voxels" in str(exact)
        assert "an upper bound" not in str(exact)


@pytest.mark.long
def test_proposed_passes_keep_a_budget() -> None:
    net, size = network(3), (24, 25, 22)
    truth = SHAPES["shell"](size)
    for image in (None, truth[None, None]):
        whole = estimate_network(net, (1, 2, *size), system="occupancy", image=image)
        points = []
        for share in (1.0, 0.5):
            budget = int(share * whole.peak_bytes)
            found = estimate_network(net, (1, 2, *size), system="occupancy", image=image, memory_budget=budget)
            points.append(found.setting["points_per_pass"])
            assert found.peak_bytes <= budget
            assert measured(net, truth, found.inferer) <= budget
        assert len(set(points)) > 1
        with pytest.raises(InputError, match="memory_budget is 100000: raise it"):
            estimate_network(net, (1, 2, *size), system="occupancy", image=image, memory_budget=100_000)


@pytest.mark.long
def test_larger_volumes_are_extended_from_balls_in_small_ones() -> None:
    """What two small volumes foretell is at least what the volume itself takes, and at most an eighth more."""
    for extents in ((112, 128, 96), (40, 144, 144)):
        axes = [torch.linspace(-1, 1, n) for n in extents]
        square = (axes[0] ** 2)[:, None, None] + (axes[1] ** 2)[:, None] + axes[2] ** 2
        shell = (square <= 0.9**2) & (square > 0.45**2)
        for classes in (1, 4):
            answers = Answers(classes, torch.float32, 2**12)
            real, foretold = along_a_mask(shell, answers), around_balls(extents, answers)
            assert real.peak_bytes <= foretold.peak_bytes * 1.02
            if classes == 1:
                assert foretold.peak_bytes <= 1.13 * real.peak_bytes
            assert max(one.waiting for one in real.passes) <= 1.02 * foretold.passes[0].waiting
            assert foretold.passes[0].points == 2**12 >= max(one.points for one in real.passes)


def test_an_image_of_other_extents_is_refused() -> None:
    with pytest.raises(InputError, match="give one of the input's extents"):
        estimate_network(network(2), (1, 2, 24, 24, 24), system="occupancy", image=torch.ones(1, 1, 24, 24, 25))

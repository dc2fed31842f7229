"""Streaming under autocast to bfloat16 differs from the whole by no more than rounding does."""

from __future__ import annotations

import pytest
import torch

from monai_memeff.halo import SpatialPartitionInferer
from tests.halo.networks import NETWORKS

ROUNDING = 2.5  # parts round elsewhere than the whole; a wrong row would be far outside
NAMES = ["UNet instance", "UNet batch", "SegResNet", "PlainConvUNet"]


def lowered(on: bool = True) -> torch.autocast:
    """Autocast on the CPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def first(output: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The output at full resolution."""
    return output[0] if isinstance(output, (list, tuple)) else output


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference."""
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_streamed_inference(name: str) -> None:
    torch.manual_seed(2)
    network, x = NETWORKS[name]().eval(), torch.randn(1, 1, 64, 16, 16)
    with torch.no_grad():
        single = first(network(x))
        with lowered():
            whole = first(network(x)).float()
    moved = {}
    for low in (False, True):
        inferer = SpatialPartitionInferer(4)
        with lowered(low):
            got = first(inferer(x, network))
        assert got.dtype == (torch.bfloat16 if low else torch.float32)
        assert inferer.last_report is not None
        moved[low] = inferer.last_report.moved_bytes
    rounding = distance(whole, single)
    assert distance(got.float(), single) < ROUNDING * rounding
    assert distance(got.float(), whole) < ROUNDING * rounding
    assert moved[True] < 0.75 * moved[False]

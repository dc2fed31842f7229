"""Dropout and stochastic depth: a mask depends on the seed, the step, the node and the position, not on the cut."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import nn

from monai_memeff.halo import gather, scatter, spatial_partition
from monai_memeff.halo.run.ranks import schedule
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from tests.halo.ranks.compare import captured_once, gradients, weighed
from tests.halo.ranks.threads import run_ranks

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "voxels": lambda: nn.Dropout(0.5),
    "channels": lambda: nn.Dropout3d(0.5),
    "alpha": lambda: nn.AlphaDropout(0.5),
}


def trained(network: nn.Module, x: torch.Tensor, parts: int, steps: int = 1, segments: int = 1) -> list[torch.Tensor]:
    """Outputs of some steps, then the summed gradients of the last, for a cut."""

    drawn = threading.local()

    def draw_seed() -> torch.Tensor:  # threads share torch's generator, processes do not
        drawn.count = getattr(drawn, "count", 0) + 1
        return torch.tensor([100 * drawn.rank + drawn.count])

    def work(mesh: HaloMesh) -> list[torch.Tensor]:
        mine, drawn.rank = spatial_partition(copy.deepcopy(network), mesh, segments), mesh.comm.rank
        found = []
        for _ in range(steps):
            mine.zero_grad()
            y = mine(scatter(x, mesh))
            weighed(y).backward()
            found.append(gather(y, mesh))
        return [*found, *(mesh.comm.all_reduce(g) for g in gradients(mine).values())]

    with captured_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "draw_seed", draw_seed)
        return run_ranks(work, (parts,))[0]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.slow
def test_any_cut_draws_the_same_mask_and_every_node_and_step_another(layer: str) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv3d(1, 8, 1), LAYERS[layer](), nn.Conv3d(8, 8, 1), LAYERS[layer]()]
    network, x = nn.Sequential(*convs).double(), torch.rand(2, 1, 9, 4, 4, dtype=torch.float64) + 1
    whole = trained(network, x, 1, steps=2)
    for parts, segments in ((2, 1), (4, 3)):
        for a, b in zip(whole, trained(network, x, parts, steps=2, segments=segments), strict=True):
            torch.testing.assert_close(b, a, atol=1e-11, rtol=1e-11)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.slow
def test_voxels_and_channels_are_dropped_at_their_rate() -> None:
    ones = torch.ones(4, 64, 8, 4, 4)
    for name, layer in LAYERS.items():
        if name == "alpha":
            continue
        (y, *_) = trained(nn.Sequential(layer(), _Scale()), ones, 2)
        assert set(y.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < float((y == 0).float().mean()) < 0.6
        per_channel = (y == 0).flatten(2).float().mean(-1)
        assert (set(per_channel.unique().tolist()) <= {0.0, 1.0}) is (name == "channels")


class _Scale(nn.Module):
    """Multiplies by one, so that there is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.one


@pytest.mark.slow
def test_stochastic_depth_under_any_cut() -> None:
    torch.manual_seed(0)
    encoder = ResidualEncoder(
        1, 2, [4, 8], nn.Conv3d, 3, [1, 2], 3, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True}, nonlin=nn.ReLU, stochastic_depth_p=0.5,
    )  # fmt: skip
    network = nn.Sequential(encoder, nn.Conv3d(8, 2, 1)).double()
    x = torch.randn(2, 1, 10, 6, 6, dtype=torch.float64)
    whole = trained(network, x, 1)
    for parts in (2, 3):
        for a, b in zip(whole, trained(network, x, parts), strict=True):
            torch.testing.assert_close(b, a, atol=1e-10, rtol=1e-10)

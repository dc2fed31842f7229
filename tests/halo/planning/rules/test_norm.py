"""Norms of every kind, in training and evaluation, cut anywhere, against torch."""

import pytest
import torch
from torch import nn

from tests.halo.parts import in_parts


class HalfAffine(nn.Module):
    """A group norm with a weight but no bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return nn.functional.group_norm(x, 2, self.weight)


NORMS = {
    "instance": lambda: nn.InstanceNorm3d(4),
    "instance affine": lambda: nn.InstanceNorm3d(4, affine=True),
    "instance tracked": lambda: nn.InstanceNorm3d(4, track_running_stats=True),
    "batch": lambda: nn.BatchNorm3d(4),
    "batch untracked": lambda: nn.BatchNorm3d(4, track_running_stats=False),
    "batch plain": lambda: nn.BatchNorm3d(4, affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "group plain": lambda: nn.GroupNorm(4, 4, affine=False),
    "half affine": HalfAffine,
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.slow
def test_norm(name, train):
    torch.manual_seed(0)
    net = nn.Sequential(NORMS[name](), nn.Conv3d(4, 2, 3)).double().train(train)
    for parameter in net.parameters():
        nn.init.uniform_(parameter)
    x = torch.randn(2, 4, 11, 7, 6, dtype=torch.float64) * 3 + 5
    for axes in [(2,), (0, 1)]:
        assert in_parts(net, x, axes=axes) < 1e-12

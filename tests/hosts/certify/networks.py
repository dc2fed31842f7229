"""Networks that tests certify by name: `tests.hosts.certify.networks:unet`."""

from __future__ import annotations

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn


def unet() -> nn.Module:
    """Halves twice and normalizes over the volume: a window sees other statistics."""
    torch.manual_seed(0)
    return UNet(3, 1, 3, (4, 8, 8), (2, 2), num_res_units=0, norm="instance")


def rounding() -> nn.Module:
    """Halves once without a way around: what it returns of an odd extent is a voxel longer."""
    torch.manual_seed(0)
    return UNet(3, 1, 2, (4, 8), (2,), num_res_units=0, norm="instance")


def convolution() -> nn.Module:
    """One channel."""
    torch.manual_seed(0)
    return nn.Conv3d(1, 1, 3, padding=1)


class Branching(nn.Module):
    """Takes one of two ways by the values it sees, which no plan made before can know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, or its negative where the volume is bright."""
        return -self.conv(x) if x.mean() > 0.5 else self.conv(x)


def branching() -> nn.Module:
    """Cannot be partitioned."""
    return Branching()


class Constant(nn.Module):
    """Channel 1 where the voxel is positive, whatever surrounds it."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, ...) of which the larger is the sign."""
        return torch.cat([-x, x], 1)


def sign() -> nn.Module:
    """No weights, no neighbors: every way gives the same."""
    return Constant()


class Position(nn.Module):
    """Positive voxels brighter than the mean of what is seen, which is another mean in every window."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, ...)."""
        centered = x - x.mean(dim=(2, 3, 4), keepdim=True)
        return torch.cat([-centered, centered], 1)


def above_mean() -> nn.Module:
    """A window decides by its own mean."""
    return Position()


class Counting(nn.Module):
    """Adds the number of its calls: no two runs are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """The input and its negative, and a little more every time."""
        self.calls += 1
        return torch.cat([-x, x], 1) + self.calls


class Table(nn.Module):
    """Looks numbers up, so it takes integers and no floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, ...) from (B, 1, ...) integers."""
        assert not x.is_floating_point()
        return self.table(x[:, 0].long()).movedim(-1, 1)


def counting() -> nn.Module:
    """Changes its own buffer."""
    return Counting()


def broken() -> nn.Module:
    """Weights of NaN."""
    network = convolution()
    nn.init.constant_(next(network.parameters()), float("nan"))
    return network


def failing() -> nn.Module:
    """Fails."""
    raise KeyError("no such\nweights")


def shapes() -> nn.Module:
    """No weights."""
    return nn.Conv3d(1, 2, 3, padding=1, device="meta")


def halving() -> nn.Module:
    """Fewer voxels than the image."""
    return nn.Conv3d(1, 2, 3, stride=2, padding=1)


def leaving() -> nn.Module:
    """Ends the process."""
    raise SystemExit(3)


def text() -> str:
    """No network."""
    return "network"

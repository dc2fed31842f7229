"""Networks of both hosts at tiny widths, a LinkNet, and one with nested outputs."""

from __future__ import annotations

from typing import Any

import monai.networks.nets as nets
import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import nn

F6, F3, S2 = (2, 2, 4, 4, 4, 2), (2, 4, 8), (2, 2)


class LinkNet(nn.Module):
    """A residual LinkNet whose stem has stride 4, as published brain-extraction networks have."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv3d(1, w, 7, 4, 3, bias=False), nn.BatchNorm3d(w), nn.ReLU(inplace=True))
        self.down = nn.ModuleList(_Residual(w * 2**i, w * 2 ** (i + 1)) for i in range(2))
        self.up = nn.ModuleList(_Decode(w * 2 ** (i + 1), w * 2**i) for i in range(2))
        self.head = nn.Sequential(nn.ConvTranspose3d(w, w, 4, 4), nn.ReLU(inplace=True), nn.Conv3d(w, 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        y = levels.pop()
        for up in reversed(self.up):
            skip = levels.pop()
            y = up(y)[..., : skip.shape[2], : skip.shape[3], : skip.shape[4]] + skip
        return self.head(y)


class _Residual(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv3d(a, b, 3, 2, 1, bias=False),
            nn.BatchNorm3d(b),
            nn.ReLU(inplace=True),
            nn.Conv3d(b, b, 3, 1, 1, bias=False),
            nn.BatchNorm3d(b),
        )
        self.short = nn.Conv3d(a, b, 1, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.main(x) + self.short(x))


class _Decode(nn.Sequential):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(
            nn.Conv3d(a, a // 2, 1),
            nn.BatchNorm3d(a // 2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose3d(a // 2, a // 2, 3, 2, 1, 1),
            nn.BatchNorm3d(a // 2),
            nn.ReLU(inplace=True),
            nn.Conv3d(a // 2, b, 1),
        )


class Nested(nn.Module):
    """A network that returns a nest of volumes, numbers and None."""

    def __init__(self) -> None:
        super().__init__()
        self.body = unet()

    def forward(self, x: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
        y = self.body(x)
        return {"logits": y, "more": (y.sigmoid(), [None, y.mean()]), "name": "nest", "input": x}


def unet(n: int = 3, **extra: Any) -> nn.Module:
    """MONAI's UNet of three levels."""
    return nets.UNet(**{"spatial_dims": n, "in_channels": 1, "out_channels": 2, "channels": F3, "strides": S2, **extra})


def nnunet(kind: type[nn.Module], **extra: Any) -> nn.Module:
    """An nnU-Net network of three stages with deep supervision."""
    blocks = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"
    options: dict[str, Any] = {
        "input_channels": 1,
        "n_stages": 3,
        "features_per_stage": list(F3),
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        blocks: 1,
        "num_classes": 2,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    return kind(**{**options, **extra})


def residual(**extra: Any) -> nn.Module:
    """A ResidualEncoderUNet whose encoder has options that its own constructor does not pass on."""
    network = nnunet(ResidualEncoderUNet)
    network.encoder = ResidualEncoder(
        1,
        3,
        list(F3),
        nn.Conv3d,
        3,
        [1, 2, 2],
        1,
        True,
        nn.InstanceNorm3d,
        {"affine": True},
        nonlin=nn.LeakyReLU,
        return_skips=True,
        **extra,
    )
    return network


def swin(n: int = 3, **extra: Any) -> nn.Module:
    """SwinUNETR."""
    return nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=n, **extra)


def dints(switches: Any) -> nn.Module:
    """DiNTS with a searched topology; the switches of its nodes are an array of NumPy or torch."""
    space = nets.TopologyInstance(
        channel_mul=0.2,
        num_blocks=4,
        num_depths=3,
        use_downsample=True,
        arch_code=[np.ones((4, 7)), np.ones((4, 7))],
        device="cpu",
    )
    return nets.DiNTS(space, 1, 2, use_downsample=True, node_a=switches)

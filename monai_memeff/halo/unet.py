"""The 3D U-Net of Hou et al. 2019, plain: `spatial_partition` spreads it over devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from monai_memeff.arguments import numbers_checked

FEATURES = {64: (256, 512, 1024), 128: (128, 256, 512, 1024), 256: (64, 128, 256, 512, 1024)}
FEATURES[512] = (32, 64, 128, 256, 512, 1024)


class _Level(nn.Sequential):
    """Convolutions of one level: 3^3 without bias, batch norm over batch and space, leaky ReLU 0.1, dropout."""

    def __init__(self, in_channels: int, channels: int, convs: int, dropout: float, first_dropout: float) -> None:
        layers: list[nn.Module] = []
        for i in range(convs):
            rate = first_dropout if i == 0 else dropout
            layers += [
                nn.Conv3d(in_channels if i == 0 else channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm3d(channels, eps=1e-6, momentum=0.1),
                nn.LeakyReLU(0.1, inplace=True),
                *([nn.Dropout(rate)] if rate else []),
            ]
        super().__init__(*layers)


class VolumeUNet(nn.Module):
    """3D U-Net for whole volumes: four convolutions per level, 2^3 pooling and transposed convolutions, 1^3 head.

    Hou et al. 2019, section 3 and figure 2 (https://arxiv.org/abs/1909.03108): at 512^3 six levels of 32 to 1024
    features, 184.8 million parameters. Torch's momentum 0.1 is the paper's 0.9.

    Args:
        in_channels: channels of the image.
        out_channels: classes (background, liver, lesion).
        features: channels per level; by default those of a 512^3 volume, see `FEATURES`.
        convs: convolutions per level on either side.
        dropout: rate after every convolution but the first, and after every transposed convolution.

    Shape: (B, in_channels, H, W, D) -> (B, out_channels, H, W, D), extents in multiples of 2 ** (levels - 1), which is
    32 for six levels; torch refuses others with a RuntimeError.

    Examples:
        >>> VolumeUNet(1, 3, features=(4, 8))(torch.rand(1, 1, 16, 16, 16)).shape
        torch.Size([1, 3, 16, 16, 16])
    """

    @numbers_checked
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        features: Sequence[int] = FEATURES[512],
        convs: int = 4,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        inputs = [in_channels, *features[:-1]]
        self.down = nn.ModuleList(
            _Level(a, b, convs, dropout, dropout if i else 0.0)
            for i, (a, b) in enumerate(zip(inputs, features, strict=True))
        )
        self.pool = nn.MaxPool3d(2)
        pairs = list(zip(features[1:], features[:-1], strict=True))[::-1]
        self.rise = nn.ModuleList(nn.Sequential(nn.ConvTranspose3d(a, b, 2, 2), nn.Dropout(dropout)) for a, b in pairs)
        self.up = nn.ModuleList(_Level(2 * b, b, convs, dropout, dropout) for _, b in pairs)
        self.head = nn.Conv3d(features[0], out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, out_channels, H, W, D) of an image (B, in_channels, H, W, D) of multiples of the stride."""
        skips: list[torch.Tensor] = []
        for level in self.down[:-1]:
            skips.append(level(x if not skips else self.pool(skips[-1])))
        x = self.down[-1](self.pool(skips[-1]))
        for rise, level in zip(self.rise, self.up, strict=True):
            x = level(torch.cat([rise(x), skips.pop()], dim=1))
        return self.head(x)

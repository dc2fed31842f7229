"""The 3D U-Net of Hou et al. 2019, plain: `spatial_partition` spreads it over devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.memory.checkpoint import checkpoint

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

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The convolutions, each with what follows it; one after another they are the level."""
        layers = list(self)
        starts = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv3d)]
        return [nn.Sequential(*layers[i:j]) for i, j in zip(starts, [*starts[1:], len(layers)], strict=True)]


Steps = Sequence[Callable[..., Tensor]]


def _joined(rise: nn.Module, below: Tensor, skip: Tensor) -> Tensor:
    """What a level of the decoder gets."""
    return torch.cat([rise(below), skip], dim=1)


def _plainly(steps: Steps, *x: Tensor) -> Tensor:
    """Steps one after another."""
    result = steps[0](*x)
    del x  # a skip connection is not needed beside what it was joined into
    for step in steps[1:]:
        result = step(result)
    return result


def _recomputed(steps: Steps, *x: Tensor) -> Tensor:
    """The same, of which the graph keeps the input alone.

    The backward pass computes the steps again half by half, and each half in the same way down to a single convolution
    and what follows it: it holds the inside of one, and the inputs of as many as there were halvings.
    """
    steps = [part for step in steps for part in (step.steps() if isinstance(step, _Level) else [step])]
    if len(steps) == 1:
        return checkpoint(steps[0], *x)
    middle = (len(steps) + 1) // 2
    return checkpoint(lambda *x: _recomputed(steps[middle:], _recomputed(steps[:middle], *x)), *x)


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
        use_checkpoint: the graph keeps what goes into levels; the backward pass computes the rest again, halves of a
            level within levels and convolutions within halves. Results and gradients are the same, dropout and running
            statistics included. At 512^3 in bfloat16 a training step of the published network holds 70 GiB in the
            place of 385 (counted on tensors without memory) for 1.7 times the multiplications.

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
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
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

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, out_channels, H, W, D) of an image (B, in_channels, H, W, D) of multiples of the stride."""
        run = _recomputed if self.use_checkpoint and torch.is_grad_enabled() else _plainly
        skips = [run([self.down[0]], x)]
        for level in self.down[1:]:
            skips.append(run([self.pool, level], skips[-1]))
        x = skips.pop()
        for rise, level in zip(self.rise, self.up, strict=True):
            x = run([partial(_joined, rise), level], x, skips.pop())
        return self.head(x)

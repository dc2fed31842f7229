"""The 2D U-Net that sees one slice at a time, and batch normalization that takes its statistics slice by slice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_layer


class SliceBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization whose training statistics belong to one slice position, however many slices come at once.

    The published network was trained one slice at a time, so each slice was normalized by itself. Here a batch of
    ``slices`` slices gives what as many calls with one slice each would: normalization over (B, H, W) of each slice
    position, and running statistics moved once per slice, in order. So a result does not depend on how many slices are
    computed, or recomputed, together. In evaluation mode it is ``BatchNorm2d``, and its ``state_dict`` always is.

    Examples:
        >>> slices = torch.rand(6, 2, 8, 8)  # three slices of each of two volumes
        >>> first = SliceBatchNorm2d(2)(slices, slices=3)[::3]
        >>> torch.allclose(first, torch.nn.BatchNorm2d(2)(slices[::3]), atol=1e-5)
        True
    """

    def forward(self, x: Tensor, slices: int = 1) -> Tensor:
        """Normalize.

        Args:
            x: (B * slices, C, H, W), the slices of one volume next to each other.
            slices: slices of each volume.
        """
        if slices == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        side_by_side = x.reshape(-1, slices * x.shape[1], *x.shape[2:])
        mean = x.new_zeros(side_by_side.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        var = torch.zeros_like(mean)
        weight, bias = (None if p is None else p.repeat(slices) for p in (self.weight, self.bias))
        y = F.batch_norm(side_by_side, mean, var, weight, bias, True, 1.0, self.eps)
        if self.training and self.running_mean is not None:
            self._follow(mean.view(slices, -1), var.view(slices, -1))
        return y.view_as(x)

    def _follow(self, means: Tensor, variances: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        for mean, var in zip(means, variances, strict=True):
            self.num_batches_tracked.add_(1)
            weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_(var.to(self.running_var.dtype), weight)


class SliceUNet(nn.Module):
    """The paper's 2D U-Net: 3x3 convolutions with zero padding, norm and activation, max-pooling, nearest upsampling.

    Van de Leemput et al., "Full Volumetric Brain Tissue Segmentation in Non-Contrast CT using Memory Efficient
    Convolutional LSTMs", Med-NeurIPS 2018, section 2.1. The paper leaves open what stands in the place of the original
    U-Net's deconvolution; with one output channel and the default channels the two readings have 31,389,569 parameters
    (upsample, concatenate, two convolutions) and 31,044,289 (a 2x2 convolution that halves the channels comes first).

    Args:
        in_channels: Number of channels of a slice.
        out_channels: Number of channels of the last, 1x1 convolution.
        channels: features per level, from full resolution down.
        norm: "batch", "instance", ("group", {...}) or None, as in MONAI. "batch" is taken slice by slice in training.
        act: Activation, as in MONAI.
        up_conv: the second reading: a 2x2 convolution after upsampling.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W), any H and W: inside, the far edges are repeated up to the
    next multiple of 2 ** (levels - 1), at least two of them along one axis, and cut off again.

    Raises:
        ValueError: fewer than two levels, or channels below 1.

    Examples:
        >>> SliceUNet(1, 4, channels=(4, 8))(torch.rand(2, 1, 17, 15)).shape
        torch.Size([2, 4, 17, 15])
    """

    @numbers_checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: str | tuple | None = "batch",
        act: str | tuple = "relu",
        up_conv: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) < 2 or min(*channels, in_channels, out_channels) < 1:
            raise ValueError(
                f"SliceUNet needs two or more levels and channels of at least 1, got channels {tuple(channels)}, "
                f"in_channels {in_channels}, out_channels {out_channels}."
            )
        check_layer("norm", norm, lambda: norm is None or get_norm_layer(norm, spatial_dims=2, channels=channels[0]))
        check_layer("act", act, lambda: get_act_layer(act))
        self.stride = 2 ** (len(channels) - 1)
        above = [in_channels, *channels[:-1]]
        self.encoder = nn.ModuleList(_Pair(i, o, norm, act) for i, o in zip(above, channels, strict=True))
        self.decoder = nn.ModuleList(
            _Up(low, high, norm, act, up_conv)
            for low, high in zip(reversed(channels[1:]), reversed(channels[:-1]), strict=True)
        )
        self.last = nn.Conv2d(channels[0], out_channels, 1)

    def forward(self, x: Tensor, slices: int = 1) -> Tensor:
        """Compute slices.

        Args:
            x: (B * slices, in_channels, H, W), the slices of one volume next to each other.
            slices: slices of each volume; only batch norm in training needs it.
        """
        height, width = x.shape[-2:]
        down, right = -height % self.stride, -width % self.stride
        if (height + down, width + right) == (self.stride, self.stride):
            right += self.stride  # one value per channel at the bottom has no variance to normalize by
        if down or right:
            x = F.pad(x, (0, right, 0, down), mode="replicate")
        skips = [self.encoder[0](x, slices)]
        for level in list(self.encoder)[1:]:
            skips.append(level(F.max_pool2d(skips[-1], 2), slices))
        x = skips.pop()
        for level in self.decoder:
            x = level(x, skips.pop(), slices)
        return self.last(x)[..., :height, :width]

    def costs(self) -> list[tuple[int, float]]:
        """Multiplications of every convolution: per output value, and per pixel of the slice."""
        halvings = [*range(len(self.encoder)), *reversed(range(len(self.decoder))), 0]
        found = []
        for part, halved in zip([*self.encoder, *self.decoder, self.last], halvings, strict=True):
            layers = [(m.out_channels, m.weight[0].numel()) for m in part.modules() if isinstance(m, nn.Conv2d)]
            if isinstance(part, _Up) and part.halve is None:
                high, inputs = layers[0][0], part.pair.first.conv.in_channels
                layers[:1] = [(high, 9 * high), (high, 4 * (inputs - high))]
            found += [(each, outputs * each / 4**halved) for outputs, each in layers]
        return found


class _Layer(nn.Module):
    """Convolution, norm, activation."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: str | tuple | None, act: str | tuple, kernel_size: int = 3
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2)
        self.norm = _norm_layer(norm, out_channels)
        self.act = get_act_layer(act)

    def forward(self, x: Tensor, slices: int, low: Tensor | None = None) -> Tensor:
        x = self.conv(x) if low is None else _convolve_beside_upsampled(x, low, self.conv)
        x = self.norm(x, slices) if isinstance(self.norm, SliceBatchNorm2d) else self.norm(x)
        return self.act(x)


class _Pair(nn.Module):
    """Two layers."""

    def __init__(self, in_channels: int, out_channels: int, norm: str | tuple | None, act: str | tuple) -> None:
        super().__init__()
        self.first = _Layer(in_channels, out_channels, norm, act)
        self.second = _Layer(out_channels, out_channels, norm, act)

    def forward(self, x: Tensor, slices: int, low: Tensor | None = None) -> Tensor:
        return self.second(self.first(x, slices, low), slices)


class _Up(nn.Module):
    """Upsample, put beside the encoder's features, two layers."""

    def __init__(self, low: int, high: int, norm: str | tuple | None, act: str | tuple, up_conv: bool) -> None:
        super().__init__()
        self.halve = _Layer(low, high, norm, act, kernel_size=2) if up_conv else None
        self.pair = _Pair(2 * high if up_conv else low + high, high, norm, act)

    def forward(self, x: Tensor, skip: Tensor, slices: int) -> Tensor:
        if self.halve is None:
            return self.pair(skip, slices, x)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.halve(F.pad(x, (0, 1, 0, 1)), slices)  # its kernel reaches one place right and down
        return self.pair(torch.cat((skip, x), dim=1), slices)


def _convolve_beside_upsampled(skip: Tensor, low: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(torch.cat((skip, upsampled(low)), 1))`` for a 3x3 kernel, without computing the same products repeatedly.

    Nearest upsampling repeats every value 2x2 times, so a 3x3 kernel meets at most 2x2 different ones: their weights
    are added first, for the four places of a pixel within its block apart. This takes 4 instead of 9 multiplications
    per value, and neither the upsampled nor the joined features are ever in memory.
    """
    channels, (height, width) = skip.shape[1], low.shape[-2:]
    rows = _added_taps(conv.weight[:, channels:], 2)  # (2, out, in, 2, 3): even and odd rows
    kernels = _added_taps(rows, 4)  # (2 of columns, 2 of rows, out, in, 2, 2)
    blocks = F.conv2d(low, kernels.flatten(0, 2), padding=1)
    blocks = blocks.unflatten(1, (2, 2, conv.out_channels))
    # odd places look one value further than even ones
    parts = [[blocks[:, x, y, :, y : y + height, x : x + width] for x in (0, 1)] for y in (0, 1)]
    upsampled = torch.stack([torch.stack(row, dim=-1) for row in parts], dim=-3)
    return F.conv2d(skip, conv.weight[:, :channels], conv.bias, padding=1) + upsampled.flatten(-2).flatten(2, 3)


def _added_taps(weight: Tensor, dim: int) -> Tensor:
    """Three taps as the two of an even and the two of an odd place, stacked in front."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)))


def _norm_layer(norm: str | tuple | None, channels: int) -> nn.Module:
    if norm is None:
        return nn.Identity()
    layer = get_norm_layer(norm, spatial_dims=2, channels=channels)
    if type(layer) is not nn.BatchNorm2d:
        return layer
    return SliceBatchNorm2d(channels, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)

"""Rows beyond the border of the volume: the padding modes of convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from monai_memeff.halo.arithmetic import Bounds, Span, Spans
from monai_memeff.halo.region import Region


def pad_axis(x: torch.Tensor, dim: int, low: int, high: int) -> torch.Tensor:
    """Zeros before and after the rows of one axis."""
    if low == 0 and high == 0:
        return x
    return F.pad(x, [0, 0] * (-dim - 1) + [low, high])


def pad_whole_axes(region: Region, x: torch.Tensor, low: Sequence[int], high: Sequence[int], mode: str) -> torch.Tensor:
    """Pad the axes that are not split, unless the convolution itself can do it."""
    if mode == "zeros" and tuple(low) == tuple(high):
        return x
    split = {d + region.spatial_dims for d in region.dims}
    pads = [(0, 0) if i in split else (low[i], high[i]) for i in range(len(low))]
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, mode="constant" if mode == "zeros" else mode) if any(flat) else x


def clip_for(mode: str, wanted: Span, size: int) -> Span:
    """Rows inside the volume that a padded window needs (reflection reads further in than it pads)."""
    low, high = max(wanted[0], 0), min(wanted[1], size)
    if mode == "reflect":
        high = max(high, min(1 - wanted[0], size)) if wanted[0] < 0 else high
        low = min(low, max(2 * size - 1 - wanted[1], 0)) if wanted[1] > size else low
    else:
        low, high = min(low, size - 1), max(high, 1)
    return low, high


def border(
    x: torch.Tensor,
    region: Region,
    have: Spans,
    want: Sequence[Span],
    bounds: Sequence[Bounds],
    mode: str,
    value: float = 0.0,
) -> torch.Tensor:
    """Extend a window beyond the volume's border by a padding mode, then cut it to the rows wanted."""
    pads = [0] * (2 * region.spatial_dims)
    for dim, (low, high), b in zip(region.dims, want, bounds, strict=False):
        pads[2 * (-dim - 1)], pads[2 * (-dim - 1) + 1] = max(-low, 0), max(high - b[-1], 0)
    if any(pads):
        x = F.pad(x, pads, mode=mode, value=value) if mode == "constant" else F.pad(x, pads, mode=mode)
    for dim, (low, high), (got, _) in zip(region.dims, want, have, strict=False):
        x = x.narrow(dim, low - (got - max(-low, 0)), high - low)
    return x

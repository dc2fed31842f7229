"""Random networks, a family for every kind of ordinary code that parts of a volume could get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from tests.halo.ordinary_code import (
    C,
    Call,
    Draw,
    coordinates,
    from_size,
    in_place,
    number,
    pick,
    rearrangement,
    reduction,
    spread_again,
)
from tests.halo.partitioned import Setting

Case = tuple[nn.Module, tuple[torch.Tensor, ...], list[Setting]]


def dims_of(draw: Draw) -> int:
    """Mostly volumes, sometimes images and signals."""
    return int(pick(draw, 3, 3, 3, 3, 2, 1))


def volume(draw: Draw, n: int, least: int = 5, most: int = 19, channels: int = C) -> torch.Tensor:
    """A batch of one or two small volumes of odd and even sizes."""
    sizes = [number(draw, least, most), *[number(draw, least, max(least, 8)) for _ in range(n - 1)]]
    return torch.randn(number(draw, 1, 2), channels, *sizes, dtype=torch.float64)


def settings_of(draw: Draw, n: int, count: int) -> list[Setting]:
    """Different axes and numbers of parts."""
    found = [(a, p) for a in range(n) for p in (2, 3, 5, 8, 100)]
    return list(draw(st.permutations(found)))[:count]


def layer(name: str, n: int) -> Any:
    """torch's layer of so many dimensions."""
    return getattr(nn, f"{name}{n}d")


def small_conv(n: int, k: int = 3, channels: int = C) -> nn.Module:
    """A convolution that keeps the size, so that neighboring rows meet after what is tested."""
    return layer("Conv", n)(channels, C, k, padding=k // 2)


def convolution(draw: Draw, n: int) -> nn.Module:
    """Any legal convolution: padding beyond the reach, strides that no cut is at, dilation, groups, modes, `same`."""
    kernel = [number(draw, 1, 4) for _ in range(n)]
    mode = pick(draw, "zeros", "zeros", "zeros", "replicate", "reflect", "circular")
    if pick(draw, True, False, False, False):
        return layer("Conv", n)(C, C, kernel, padding="same", dilation=number(draw, 1, 2), padding_mode=mode)
    return layer("Conv", n)(
        C,
        C,
        kernel,
        stride=[number(draw, 1, 4) for _ in range(n)],
        padding=[number(draw, 0, 4) for _ in range(n)],
        dilation=[number(draw, 1, 2) for _ in range(n)],
        groups=pick(draw, 1, 2),
        bias=pick(draw, True, False),
        padding_mode=mode,
    )


def transposed(draw: Draw, n: int) -> nn.Module:
    """Any legal transposed convolution."""
    stride, dilation = [number(draw, 1, 3) for _ in range(n)], [number(draw, 1, 2) for _ in range(n)]
    return layer("ConvTranspose", n)(
        C,
        C,
        [number(draw, 1, 4) for _ in range(n)],
        stride=stride,
        padding=[number(draw, 0, 2) for _ in range(n)],
        output_padding=[number(draw, 0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)],
        dilation=dilation,
        groups=pick(draw, 1, 2),
        bias=pick(draw, True, False),
    )


def norm(draw: Draw, n: int) -> nn.Module:
    """Every norm, affine, half-affine or not, with running statistics or not."""
    affine, tracked = pick(draw, True, False), pick(draw, True, False)
    kind = number(draw, 0, 4)
    if kind == 0:
        made = layer("BatchNorm", n)(C, affine=affine, track_running_stats=tracked)
    elif kind == 1:
        made = layer("InstanceNorm", n)(C, affine=affine, track_running_stats=tracked)
    elif kind == 2:
        made = nn.GroupNorm(pick(draw, 1, 2), C, affine=affine)
    elif kind == 3:
        made = nn.LocalResponseNorm(number(draw, 1, 3))
    else:
        made = nn.GroupNorm(2, C)
        setattr(made, pick(draw, "bias", "weight"), None)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    for name, buffer in made.named_buffers():
        if name in ("running_mean", "running_var"):
            buffer.copy_(torch.rand(C) + 0.5)
    return made


def pooling(draw: Draw, n: int) -> nn.Module:
    """Every pooling."""
    k, s = number(draw, 2, 4), number(draw, 1, 4)
    p, ceil = number(draw, 0, k // 2), pick(draw, True, False)
    kind = number(draw, 0, 5)
    if kind == 0:
        return layer("MaxPool", n)(k, s, p, number(draw, 1, 2), ceil_mode=ceil)
    if kind == 1:
        return layer("AvgPool", n)(k, s, p, ceil_mode=ceil, count_include_pad=pick(draw, True, False))
    if kind == 2:
        return layer("AdaptiveAvgPool", n)([number(draw, 1, 9) for _ in range(n)])
    if kind == 3:
        return layer("AdaptiveMaxPool", n)([number(draw, 1, 9) for _ in range(n)])
    if kind == 4:
        return layer("LPPool", n)(2, k, s)
    if n == 1:
        return nn.AvgPool1d(k, s, p)
    return layer("AvgPool", n)(k, s, p, divisor_override=number(draw, 1, 5))


def activation(draw: Draw) -> nn.Module:
    """An activation; some work in place."""
    return pick(
        draw,
        nn.ReLU(inplace=True),
        nn.LeakyReLU(0.1),
        nn.PReLU(C),
        nn.GELU(),
        nn.Softmax(1),
        nn.SiLU(inplace=True),
        nn.Softplus(),
        nn.Hardswish(),
        nn.Tanh(),
        nn.ELU(inplace=True),
        nn.Threshold(0.1, -1.0),
        nn.Identity(),
    )


def padding(draw: Draw, n: int) -> nn.Module:
    """Padding of every mode; negative for constants."""
    mode = pick(draw, "constant", "reflect", "replicate", "circular")
    least = -2 if mode == "constant" else 0
    pads = [number(draw, least, 4) for _ in range(2 * (n if mode != "constant" else number(draw, 1, n)))]
    fill = number(draw, -1, 1) if mode == "constant" else None
    return Call(f"pad {pads} {mode} {fill}", lambda x: F.pad(x, pads, mode, fill))


def resize(draw: Draw, n: int) -> nn.Module:
    """Every resize, by size or factor."""
    modes = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}[n]
    mode = pick(draw, "nearest", "nearest-exact", "area", *modes)
    align = pick(draw, None, True, False) if mode in modes else None
    if pick(draw, True, False):
        size: Any = [number(draw, 1, 23) for _ in range(n)]
        return Call(f"size {size} {mode} {align}", lambda x: F.interpolate(x, size, None, mode, align))
    factor = [pick(draw, 2, 2.0, 3.0, 0.5, 1.3, 1.7, 0.61, 1.0, 4) for _ in range(n)]
    again = pick(draw, None, True, False) if mode in ("nearest", *modes) else None
    return Call(
        f"factor {factor} {mode} {align} {again}",
        lambda x: F.interpolate(x, None, factor, mode, align, recompute_scale_factor=again),
    )


LAYERS: dict[str, Callable[[Draw, int], nn.Module]] = {
    "convolution": convolution,
    "transposed": transposed,
    "norm": norm,
    "pooling": pooling,
    "padding": padding,
    "resize": resize,
    "reduction": reduction,
    "in place": in_place,
    "coordinates": coordinates,
    "from size": from_size,
    "spread again": spread_again,
    "rearrangement": rearrangement,
}


class Branches(nn.Module):
    """Two chains of the same input, joined where their shapes allow, and both returned."""

    def __init__(self, left: nn.Module, right: nn.Module, join: str) -> None:
        super().__init__()
        self.left, self.right, self.join = left, right, join

    def forward(self, x: torch.Tensor) -> Any:
        a, b = self.left(x), self.right(x)
        if a.shape != b.shape:
            b = F.interpolate(b, a.shape[2:])
        joined = torch.cat([a, b], 1) if self.join == "cat" else a + b
        return {"joined": joined, "left": [a, None], "mean": b.mean()}


def chain(draw: Draw, n: int, kinds: list[str]) -> nn.Module:
    """Layers of these kinds with a convolution and an activation after each, so that rows meet."""
    parts: list[nn.Module] = []
    for kind in kinds:
        parts.append(LAYERS[kind](draw, n))
        if pick(draw, True, True, False):
            parts.append(small_conv(n))
        if pick(draw, True, False):
            parts.append(activation(draw))
    return nn.Sequential(small_conv(n), *parts) if pick(draw, True, False) else nn.Sequential(*parts)


@st.composite
def family(draw: Draw, kind: str, count: int = 10) -> Case:
    """A network in which one kind of layer stands among others; two chains now and then."""
    n = dims_of(draw)
    torch.manual_seed(number(draw, 0, 2**16))
    kinds = [kind, *draw(st.lists(st.sampled_from(sorted(LAYERS)), max_size=2))]
    network = chain(draw, n, list(draw(st.permutations(kinds))))
    if pick(draw, True, False, False):
        network = Branches(network, chain(draw, n, [kind]), pick(draw, "cat", "add"))
    network = network.double().train(pick(draw, False, False, True))
    return network, (volume(draw, n),), settings_of(draw, n, count)

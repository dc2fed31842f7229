"""Random networks, a family for every kind of ordinary code that parts of a volume could get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from tests.halo.partitioned import Setting

Draw = Callable[[Any], Any]
Case = tuple[nn.Module, tuple[torch.Tensor, ...], list[Setting]]
C = 2  # channels everywhere


class Call(nn.Module):
    """A function as a layer, with words that say what it is."""

    def __init__(self, words: str, fn: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.words, self.fn = words, fn
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any) -> Any:
        return self.fn(*args, **dict(self.named_children()))

    def extra_repr(self) -> str:
        return self.words


def pick(draw: Draw, *choices: Any) -> Any:
    """One of the choices."""
    return draw(st.sampled_from(choices))


def number(draw: Draw, lo: int, hi: int) -> int:
    """A number from lo to hi."""
    return int(draw(st.integers(lo, hi)))


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
        C, C, kernel, stride=[number(draw, 1, 4) for _ in range(n)], padding=[number(draw, 0, 4) for _ in range(n)],
        dilation=[number(draw, 1, 2) for _ in range(n)], groups=pick(draw, 1, 2), bias=pick(draw, True, False),
        padding_mode=mode,
    )  # fmt: skip


def transposed(draw: Draw, n: int) -> nn.Module:
    """Any legal transposed convolution."""
    stride, dilation = [number(draw, 1, 3) for _ in range(n)], [number(draw, 1, 2) for _ in range(n)]
    return layer("ConvTranspose", n)(
        C, C, [number(draw, 1, 4) for _ in range(n)], stride=stride, padding=[number(draw, 0, 2) for _ in range(n)],
        output_padding=[number(draw, 0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)],
        dilation=dilation, groups=pick(draw, 1, 2), bias=pick(draw, True, False),
    )  # fmt: skip


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
        draw, nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.PReLU(C), nn.GELU(), nn.Softmax(1), nn.SiLU(inplace=True),
        nn.Softplus(), nn.Hardswish(), nn.Tanh(), nn.ELU(inplace=True), nn.Threshold(0.1, -1.0), nn.Identity(),
    )  # fmt: skip


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


def reduction(draw: Draw, n: int) -> nn.Module:
    """A reduction in some spelling, brought back to the volume by a difference."""
    some = sorted(set(draw(st.lists(st.integers(1, n + 1), min_size=1, max_size=n + 1))))
    signed = [d - n - 2 if pick(draw, True, False) else d for d in some]
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean()": lambda x: x.mean(), "mean(())": lambda x: x.mean(dim=()), "amax(())": lambda x: x.amax(()),
        "std(True)": lambda x: x.std(True), "var(False)": lambda x: x.var(False), "sum": lambda x: x.sum(signed, True),
        "std(unbiased)": lambda x: x.std(signed, unbiased=True, keepdim=True), "max()": lambda x: x.max(),
        "std(correction)": lambda x: x.std(signed, correction=0, keepdim=True), "median()": lambda x: x.median(),
        "mean": lambda x: x.mean(signed, keepdim=True), "amin": lambda x: x.amin(signed, keepdim=True),
        "norm": lambda x: x.norm(dim=signed, keepdim=True), "norm()": lambda x: x.norm(), "norm(p)": lambda x: x.norm(3),
        "vector_norm": lambda x: torch.linalg.vector_norm(x, 1, signed, True), "min(dim)": lambda x: x.min(some[0], True)[0],
        "argmax": lambda x: x.argmax(some[0], keepdim=True).to(x.dtype), "flat argmax": lambda x: x.argmax().to(x.dtype),
        "logsumexp": lambda x: x.logsumexp(signed, True), "any": lambda x: (x > 1).any(some[0], True).to(x.dtype),
        "prod": lambda x: (x * 0.01 + 1).prod(some[0], True), "var_mean": lambda x: sum(torch.var_mean(x, signed, keepdim=True)),
        "count_nonzero": lambda x: (x > 0).count_nonzero().to(x.dtype), "aminmax": lambda x: torch.aminmax(x)[1],
        "quantile": lambda x: torch.quantile(x.flatten(), 0.3), "flat mean": lambda x: x.flatten(2).mean(-1).view(*x.shape[:2], *[1] * n),
        "einsum": lambda x: torch.einsum("bc...->bc", x).view(*x.shape[:2], *[1] * n) * 0.01,
        "dist": lambda x: torch.dist(x, x * 0.5) * 0.1, "numpy": lambda x: x.mean((0, 2), keepdim=True),
    }  # fmt: skip
    word = pick(draw, *ways)
    return Call(f"x - {word} {signed}", lambda x: x - ways[word](x))


def in_place(draw: Draw, n: int) -> nn.Module:
    """In-place edits of views, of the value itself and of slices along any axis."""
    d, k = number(draw, 1, n + 1), number(draw, 0, 3)

    def part(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[d]
        return x.narrow(d, min(k, size - 1), max(1, size - k - 1 if size > k + 1 else 1))

    def edit(x: torch.Tensor, what: int) -> torch.Tensor:
        x = x * 1.5
        view = part(x)
        if what == 0:
            torch.relu_(view)
        elif what == 1:
            view += view.mean()
        elif what == 2:
            view.copy_(view.flip(d))
        elif what == 3:
            x.select(d, min(k, x.shape[d] - 1)).zero_()
        elif what == 4:
            view[view < 0] = 0.25
        elif what == 5:
            x.transpose(1, d).mul_(1.5)
        elif what == 6:
            x[..., ::2] *= 2
        else:
            view.masked_fill_(view > 0.5, -1)
        return x

    what = number(draw, 0, 7)
    return Call(f"in place {what} dim {d} from {k}", lambda x: edit(x, what))


def coordinates(draw: Draw, n: int) -> nn.Module:
    """Coordinates and constants made in forward."""
    d = number(draw, 0, n - 1)

    def line(x: torch.Tensor) -> torch.Tensor:
        shape = [1] * (n + 2)
        shape[2 + d] = x.shape[2 + d]
        return torch.linspace(-1, 1, x.shape[2 + d], dtype=x.dtype, device=x.device).view(shape)

    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cat": lambda x: torch.cat([x[:, :1], line(x).expand_as(x[:, :1])], 1),
        "add": lambda x: x + line(x),
        "arange": lambda x: x * torch.arange(x.shape[-1], device=x.device) / x.shape[-1],
        "meshgrid": lambda x: x
        + torch.stack(torch.meshgrid(*[torch.arange(s, dtype=x.dtype) for s in x.shape[2:]], indexing="ij")).sum(0) * 0.1,
        "mask": lambda x: torch.where(line(x) > 0, x, -x),
        "ones": lambda x: x + F.pad(torch.ones_like(x), [1, 1]).narrow(-1, 0, x.shape[-1]),
        "eye": lambda x: x + torch.eye(x.shape[-1], dtype=x.dtype)[0],
        "new": lambda x: x + x.new_full(x.shape[2:], 0.5) * line(x)[0, 0],
        "index": lambda x: x.index_select(2 + d, torch.arange(x.shape[2 + d] - 1, -1, -1)),
        "fancy": lambda x: x[:, :, torch.arange(x.shape[2]) // 2],
    }
    word = pick(draw, *ways)
    return Call(f"coordinates {word} {d}", ways[word])


def from_size(draw: Draw, n: int) -> nn.Module:
    """Numbers and branches from the volume's size."""
    d, limit = number(draw, 0, n - 1), number(draw, 3, 20)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "divide": lambda x: x / x.size(2 + d),
        "branch": lambda x: x * 2 if x.shape[2 + d] > limit else x - 1,
        "numel": lambda x: x * (x.numel() ** -0.5),
        "half": lambda x: x[(slice(None),) * (2 + d) + (slice(x.shape[2 + d] // 2, None),)],
        "crop to even": lambda x: x.narrow(2 + d, 0, x.shape[2 + d] - x.shape[2 + d] % 2),
        "pad to multiple": lambda x: F.pad(x, [0, -x.shape[-1] % 4, *[0, 0] * (n - 1)]),
        "shift by size": lambda x: x.roll(x.shape[2 + d] // 3, 2 + d),
        "loop": lambda x: torch.stack([x.select(2 + d, i) * (i + 1) for i in range(min(x.shape[2 + d], 6))], 2 + d),
    }
    word = pick(draw, *ways)
    return Call(f"size {word} {d} {limit}", ways[word])


def spread_again(draw: Draw, n: int) -> nn.Module:
    """A pooled vector, or a few rows, spread over the volume and convolved again."""
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "expand": lambda x: getattr(F, f"adaptive_avg_pool{n}d")(x, 1).expand_as(x),
        "repeat": lambda x: x.mean(list(range(2, n + 2)), keepdim=True).repeat(1, 1, *x.shape[2:]),
        "interpolate": lambda x: F.interpolate(getattr(F, f"adaptive_avg_pool{n}d")(x, 1), x.shape[2:]),
        "bins": lambda x: x + F.interpolate(getattr(F, f"adaptive_avg_pool{n}d")(x, 2), x.shape[2:]),
        "profile": lambda x: x.mean(2, keepdim=True).expand_as(x),
        "matmul": lambda x: (torch.softmax(x.flatten(2) @ x.flatten(2).transpose(1, 2) * 0.1, -1) @ x.flatten(2)).view_as(x),
        "linear": lambda x: F.linear(x.flatten(2).mean(-1), torch.eye(C, dtype=x.dtype) * 2).view(*x.shape[:2], *[1] * n).expand_as(x),
        "gate": lambda x: x * x.amax(list(range(2, n + 2)), keepdim=True).sigmoid(),
        "repeat_interleave": lambda x: x.repeat_interleave(2, 2),
        "tile": lambda x: x.tile(*[1] * (n + 1), 2),
    }  # fmt: skip
    word = pick(draw, *ways)
    return Call(f"spread {word}", ways[word])


def rearrangement(draw: Draw, n: int) -> nn.Module:
    """Concatenating, slicing, rolling, flipping, transposing and folding along any axis."""
    d, k = number(draw, 2, n + 1), number(draw, 1, 4)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cat": lambda x: torch.cat([x, x.flip(d), x], d),
        "slice": lambda x: x[(slice(None),) * d + (slice(min(k, x.shape[d] - 1), None, pick_step),)],
        "roll": lambda x: x.roll((k, -k), (d, 2)),
        "roll all": lambda x: x.roll(k),
        "flip": lambda x: x.flip([d, 1]),
        "swap": lambda x: x.transpose(2, d),
        "view": lambda x: x.flatten(2).view_as(x),
        "split": lambda x: torch.cat(x.split(k, d)[::-1], d),
        "chunk": lambda x: torch.cat(x.chunk(k, d)[::-1], d),
        "stack": lambda x: torch.stack([x, -x], 2).flatten(2, 3),
        "channels from space": lambda x: x.movedim(d, 1).movedim(1, d),
        "unfold": lambda x: x.unfold(d, min(k, x.shape[d]), k).sum(-1),
        "diff": lambda x: x.diff(dim=d),
        "batch and space": lambda x: x.transpose(0, 2).transpose(0, 2) * 2,
        "gather": lambda x: x.gather(d, x.argsort(d)),
        "take": lambda x: x[:, :, [0, x.shape[2] - 1, 0]],
        "rot90": lambda x: x.rot90(1, (1, 2)).rot90(-1, (1, 2)),
        "cumsum": lambda x: x.cumsum(d) * 0.1,
        "softmax": lambda x: x.softmax(d),
        "sort": lambda x: x.sort(d)[0],
        "pixel": lambda x: x.unflatten(2, (-1, 1)).flatten(2, 3),
        "folded batch": lambda x: x.transpose(1, 2).flatten(0, 1).unflatten(0, (x.shape[0], -1)).transpose(1, 2),
    }
    pick_step = number(draw, 1, 3)
    word = pick(draw, *ways)
    return Call(f"{word} {d} {k} {pick_step}", ways[word])


LAYERS: dict[str, Callable[[Draw, int], nn.Module]] = {
    "convolution": convolution, "transposed": transposed, "norm": norm, "pooling": pooling, "padding": padding,
    "resize": resize, "reduction": reduction, "in place": in_place, "coordinates": coordinates,
    "from size": from_size, "spread again": spread_again, "rearrangement": rearrangement,
}  # fmt: skip


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

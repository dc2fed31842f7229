"""Layers made of ordinary code: reductions, in-place edits, coordinates, numbers from the size, rearrangements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

Draw = Callable[[Any], Any]
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


def reduction(draw: Draw, n: int) -> nn.Module:
    """A reduction in some spelling, brought back to the volume by a difference."""
    some = sorted(set(draw(st.lists(st.integers(1, n + 1), min_size=1, max_size=n + 1))))
    signed = [d - n - 2 if pick(draw, True, False) else d for d in some]
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean()": lambda x: x.mean(),
        "mean(())": lambda x: x.mean(dim=()),
        "amax(())": lambda x: x.amax(()),
        "std(True)": lambda x: x.std(True),
        "var(False)": lambda x: x.var(False),
        "sum": lambda x: x.sum(signed, True),
        "std(unbiased)": lambda x: x.std(signed, unbiased=True, keepdim=True),
        "max()": lambda x: x.max(),
        "std(correction)": lambda x: x.std(signed, correction=0, keepdim=True),
        "median()": lambda x: x.median(),
        "mean": lambda x: x.mean(signed, keepdim=True),
        "amin": lambda x: x.amin(signed, keepdim=True),
        "norm": lambda x: x.norm(dim=signed, keepdim=True),
        "norm()": lambda x: x.norm(),
        "norm(p)": lambda x: x.norm(3),
        "vector_norm": lambda x: torch.linalg.vector_norm(x, 1, signed, True),
        "min(dim)": lambda x: x.min(some[0], True)[0],
        "argmax": lambda x: x.argmax(some[0], keepdim=True).to(x.dtype),
        "flat argmax": lambda x: x.argmax().to(x.dtype),
        "logsumexp": lambda x: x.logsumexp(signed, True),
        "any": lambda x: (x > 1).any(some[0], True).to(x.dtype),
        "prod": lambda x: (x * 0.01 + 1).prod(some[0], True),
        "var_mean": lambda x: sum(torch.var_mean(x, signed, keepdim=True)),
        "count_nonzero": lambda x: (x > 0).count_nonzero().to(x.dtype),
        "aminmax": lambda x: torch.aminmax(x)[1],
        "quantile": lambda x: torch.quantile(x.flatten(), 0.3),
        "flat mean": lambda x: x.flatten(2).mean(-1).view(*x.shape[:2], *[1] * n),
        "einsum": lambda x: torch.einsum("bc...->bc", x).view(*x.shape[:2], *[1] * n) * 0.01,
        "dist": lambda x: torch.dist(x, x * 0.5) * 0.1,
        "numpy": lambda x: x.mean((0, 2), keepdim=True),
    }
    word = pick(draw, *ways)
    return Call(f"x - {word} {signed}", lambda x: x - ways[word](x))


def in_place(draw: Draw, n: int) -> nn.Module:
    """In-place edits of views, of the value itself and of slices along any axis."""
    d, k = number(draw, 1, n + 1), number(draw, 0, 3)

    def part(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[d]
        return x.narrow(d, min(k, size - 1), max(1, size - k - 1 if size > k + 1 else 1))

    def add_mean(x: torch.Tensor) -> None:
        view = part(x)
        view += view.mean()

    def fill_negative(x: torch.Tensor) -> None:
        view = part(x)
        view[view < 0] = 0.25

    edits: dict[str, Callable[[torch.Tensor], object]] = {
        "relu": lambda x: torch.relu_(part(x)),
        "add": add_mean,
        "copy": lambda x: part(x).copy_(part(x).flip(d)),
        "row": lambda x: x.select(d, min(k, x.shape[d] - 1)).zero_(),
        "where": fill_negative,
        "transposed": lambda x: x.transpose(1, d).mul_(1.5),
        "strided": lambda x: x[..., ::2].mul_(2),
        "masked": lambda x: part(x).masked_fill_(part(x) > 0.5, -1),
    }
    word = pick(draw, *edits)

    def edit(x: torch.Tensor) -> torch.Tensor:
        x = x * 1.5
        edits[word](x)
        return x

    return Call(f"in place {word} dim {d} from {k}", edit)


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
        "meshgrid": lambda x: (
            x
            + torch.stack(torch.meshgrid(*[torch.arange(s, dtype=x.dtype) for s in x.shape[2:]], indexing="ij")).sum(0)
            * 0.1
        ),
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
        "matmul": lambda x: (
            torch.softmax(x.flatten(2) @ x.flatten(2).transpose(1, 2) * 0.1, -1) @ x.flatten(2)
        ).view_as(x),
        "linear": lambda x: (
            F.linear(x.flatten(2).mean(-1), torch.eye(C, dtype=x.dtype) * 2).view(*x.shape[:2], *[1] * n).expand_as(x)
        ),
        "gate": lambda x: x * x.amax(list(range(2, n + 2)), keepdim=True).sigmoid(),
        "repeat_interleave": lambda x: x.repeat_interleave(2, 2),
        "tile": lambda x: x.tile(*[1] * (n + 1), 2),
    }
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

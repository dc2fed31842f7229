"""Random numbers as a function of (seed of the call, node, position in the whole tensor), the same under any cut.

torch's generators hand out numbers in the order in which a kernel draws them, so a part would draw others than the
whole. Here the number at a position is a 64-bit hash of it (the finalizer of SplitMix64, Steele et al. 2014, in
integers that wrap), so parts, tiles and a second pass for activation checkpointing agree. The numbers differ from those
that the plain network draws; their distribution is the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.layout import Box, Layout
from monai_memeff.halo.planning.program import Ref, Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, aligned, arguments, broadcast_layout
from monai_memeff.halo.planning.rules.table import Expansion, expander, rule

_CHUNK = 2**20  # positions hashed at a time: their integers take 8 bytes each
_BITS = 53  # of a uniform number


def _signed(x: int) -> int:
    """64 bits as torch's signed integer."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: torch.Tensor, n: int) -> torch.Tensor:
    """The bits moved down; torch's shift repeats the sign."""
    return (x >> n) & (2 ** (64 - n) - 1)


def hashed(positions: torch.Tensor, key: int) -> torch.Tensor:
    """53 random bits for every position, as int64 from 0 to 2^53 - 1."""
    x = positions * _signed(0x9E3779B97F4A7C15) + _signed(key)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(x ^ _shifted(x, 31), 64 - _BITS)


def key_of(seed: int, name: str) -> int:
    """The hash's key for a node of the network in one call."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def positions(layout: Layout, box: Box, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the rows `box` of a tensor lie in the whole, counted in elements, as two summands that broadcast.

    Returns:
        The first over all dimensions but the last, as a column; the second over the last, as a row.
    """
    stride, parts = 1, []
    for dim in reversed(layout.dims):
        line = torch.zeros(1, dtype=torch.int64, device=device)
        for size, axis in reversed(dim):
            lo, hi = (0, size) if axis < 0 else box[axis]
            line = (torch.arange(lo, hi, device=device)[:, None] * stride + line[None]).flatten()
            stride *= size
        parts.append(line)
    last = parts[0] if parts else torch.zeros(1, dtype=torch.int64, device=device)
    outer = torch.zeros(1, dtype=torch.int64, device=device)
    for line in reversed(parts[1:]):
        outer = (outer[:, None] + line[None]).flatten()
    return outer[:, None], last[None]


def _fill(layout: Layout, box: Box, key: int, out: torch.Tensor, change: Any) -> torch.Tensor:
    """Fill `out` with a function of the bits at every position, some rows at a time."""
    outer, last = positions(layout, box, out.device)
    flat, step = out.view(outer.shape[0], last.shape[1]), max(1, _CHUNK // max(last.shape[1], 1))
    for start in range(0, outer.shape[0], step):
        flat[start : start + step] = change(hashed(outer[start : start + step] + last, key))
    return out


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    return bits.double() * 2.0**-_BITS


class Draw(Step):
    """Numbers of one distribution: uniform, normal or true with a probability."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The numbers at these rows."""
        kind, number = self.value.args
        key, shape = key_of(env.seed, self.value.name), self.out.part_shape(box)
        out = torch.empty(shape, dtype=self.value.dtype, device=env.device)
        if kind == "bernoulli":
            below = int(number * 2**_BITS)
            return _fill(self.out, box, key, out, lambda bits: (bits < below).to(out.dtype))
        if kind == "uniform":
            return _fill(self.out, box, key, out, lambda bits: _uniform(bits).to(out.dtype))
        wide = torch.empty_like(out, dtype=torch.float64)  # Box and Muller 1958
        radius = _fill(self.out, box, key, wide, _uniform).clamp_min_(2.0**-_BITS).log_().mul_(-2).sqrt_()
        angle = _fill(self.out, box, key ^ 1, torch.empty_like(wide), _uniform).mul_(2 * math.pi)
        return radius.mul_(angle.cos_()).to(out.dtype)


class Dropout(Step):
    """Elements kept with probability 1 - p and divided by it."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The rows with some elements dropped."""
        (x,), p = tensors, self.value.args[1]
        kept, below = torch.empty(x.shape, dtype=torch.bool, device=x.device), int((1 - p) * 2**_BITS)
        _fill(self.out, box, key_of(env.seed, self.value.name), kept, lambda bits: bits < below)
        return torch.where(kept, x * (1 / (1 - p)), 0.0) if p < 1 else x * 0


@rule("halo.draw", "random", "a hash of seed, node and position")
def bind_draw(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Random numbers of a volume's shape or of a small one."""
    out = ctx.default(value.shape) if ctx.volume(value.shape) else ctx.whole(value.shape)
    return Draw(value, (), (), out)


@rule("halo.dropout", "random", "a mask that is a hash of seed, node and position")
def bind_dropout(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Dropout, cut as its input."""
    out = broadcast_layout(value.shape, natives, ctx)
    return Dropout(value, value.refs(), [out], out)


class Below(Step):
    """Where drawn numbers lie below probabilities."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The rows' answers.

        Raises:
            ValueError: for other numbers than probabilities, as in torch.
        """
        drawn, probability = tensors
        if probability.device.type != "meta" and not bool(((probability >= 0) & (probability <= 1)).all()):
            raise ValueError(f"{self.value.where}: torch.bernoulli takes probabilities from 0 to 1 but got others.")
        return drawn < probability


@rule("halo.below", "random", "a hash of seed, node and position")
def bind_below(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Row for row."""
    out = broadcast_layout(value.shape, natives, ctx)
    return Below(value, value.refs(), [aligned(n.shape, out) for n in natives], out)


def is_random(value: Value) -> bool:
    """Whether a value depends on the seed of the call."""
    return value.target in ("halo.draw", "halo.dropout")


def _draw(x: Expansion, kind: str, number: float = 0.0, suffix: str = "", dtype: torch.dtype | None = None) -> Ref:
    made = x.add(suffix, "halo.draw", x.value.shape, [kind, number], dtype)
    x.program[made].dependent = True  # every call draws again
    return made


@expander(["native_dropout", "dropout"])
def expand_dropout(x: Expansion) -> Ref | None:
    """Dropout of single elements; in evaluation mode it is its input."""
    source, p, train = x.value.args[:3]
    if x.value.pick not in (None, 0):
        return None
    if train is False or p == 0:
        return source
    return x.add("", "halo.dropout", x.value.shape, [source, float(p)])


def _require(x: Expansion, holds: bool, what: str) -> None:
    if not holds:
        raise NotPartitionableError(f"{x.value.where}: {x.value.target} takes {what}")


@expander(["bernoulli.p"])
def expand_bernoulli(x: Expansion) -> Ref:
    """Ones with one probability; the input gives only its shape."""
    probability = float(x.value.args[1])
    _require(x, 0 <= probability <= 1, f"a probability from 0 to 1 but got {probability}")
    return _draw(x, "bernoulli", probability)


@expander(["bernoulli.default"])
def expand_probabilities(x: Expansion) -> Ref:
    """Ones with the probabilities of a tensor."""
    drawn = _draw(x, "uniform", suffix="drawn", dtype=torch.float64)
    less = x.add("less", "halo.below", x.value.shape, [drawn, x.value.args[0]], torch.bool)
    return _as(x, less)


def _as(x: Expansion, source: Ref) -> Ref:
    """A value in the type of the call's result."""
    made = x.add("", torch.ops.aten._to_copy.default, x.value.shape, [source])
    x.program[made].kwargs["dtype"] = x.value.dtype
    return made


@expander(["rand", "rand_like", "randn", "randn_like"])
def expand_numbers(x: Expansion) -> Ref | None:
    """Uniform or normal numbers."""
    if not x.value.dtype.is_floating_point:
        return None
    return _draw(x, "normal" if "randn" in str(x.value.target) else "uniform")


def _two(x: Expansion, first: float, second: float) -> tuple[Any, Any]:
    """The two arguments after the input, or their defaults."""
    given = x.value.args[1:]
    return given[0] if given else first, given[1] if len(given) > 1 else second


@expander(["uniform.default"])
def expand_uniform(x: Expansion) -> Ref:
    """Uniform numbers between two bounds."""
    low, high = _two(x, 0.0, 1.0)
    _require(x, low <= high, f"bounds in order but got {low} and {high}")
    drawn = _draw(x, "uniform", suffix="drawn")
    scaled = x.add("scaled", torch.ops.aten.mul.Tensor, x.value.shape, [drawn, high - low])
    return x.add("", torch.ops.aten.add.Tensor, x.value.shape, [scaled, low])


@expander(["normal_functional.default"])
def expand_normal(x: Expansion) -> Ref:
    """Normal numbers of a mean and a standard deviation."""
    mean, deviation = _two(x, 0.0, 1.0)
    drawn = _draw(x, "normal", suffix="drawn")
    scaled = x.add("scaled", torch.ops.aten.mul.Tensor, x.value.shape, [drawn, deviation])
    return x.add("", torch.ops.aten.add.Tensor, x.value.shape, [scaled, mean])


@expander(["rrelu", "rrelu_with_noise_functional"])
def expand_rrelu(x: Expansion) -> Ref | None:
    """A leaky slope drawn for every element; in evaluation mode the mean of the bounds."""
    aten, args = torch.ops.aten, arguments(x.value)
    source, low, high = args["self"], float(args["lower"]), float(args["upper"])
    if x.value.pick not in (None, 0):
        return None
    if not args["training"]:
        return x.add("", aten.leaky_relu.default, x.value.shape, [source, (low + high) / 2])
    drawn = _draw(x, "uniform", suffix="drawn")
    scaled = x.add("scaled", aten.mul.Tensor, x.value.shape, [drawn, high - low])
    slope = x.add("slope", aten.add.Tensor, x.value.shape, [scaled, low])
    below = x.add("below", aten.mul.Tensor, x.value.shape, [source, slope])
    positive = x.add("positive", aten.gt.Scalar, x.value.shape, [source, 0], torch.bool)
    return x.add("", aten.where.self, x.value.shape, [positive, source, below])

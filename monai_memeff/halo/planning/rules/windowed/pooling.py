"""Pooling with ceil mode, counting, divisors and places; adaptive pooling row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Layout, Range
from monai_memeff.halo.planning.program import Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, arguments
from monai_memeff.halo.planning.rules.table import rule
from monai_memeff.halo.planning.rules.windowed.windows import clipped, pad_rows, range_of, tuple_of, window_layouts

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG = {2: F.avg_pool2d, 3: F.avg_pool3d}
_AVG_ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_MAX_ADAPTIVE = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


class _Pool(Step):
    heavy = True

    def __init__(self, value: Value, natives: Sequence[Layout], ctx: Context, n: int) -> None:
        args = arguments(value)
        self.args, self.n, self.first = args, n, len(value.shape) - n
        self.kernel = tuple_of(args["kernel_size"], n)
        self.stride = tuple_of(args["stride"], n, self.kernel)
        self.padding = tuple_of(args["padding"], n, 0)
        self.dilation = tuple_of(args.get("dilation"), n, 1)
        self.ceil = bool(args["ceil_mode"])
        source, out, self.sliding = window_layouts(natives[0], value.shape, ctx, self.first, n)
        super().__init__(value, value.refs(), [source], out)

    def span(self, axis: int, box: Box) -> Range:
        """The rows under the windows, padding included."""
        i = self.sliding[axis] - self.first
        lo, hi = range_of(box, self.out, axis)
        start = lo * self.stride[i] - self.padding[i]
        return start, start + (hi - lo - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The rows under the windows."""
        rows = list(self.same(0, box))
        for axis in self.sliding:
            rows[axis] = clipped(*self.span(axis, box), self.reads[0].rows[axis])
        return (Read(0, tuple(rows)),)

    def filled(self, x: torch.Tensor, reads: Sequence[Read], box: Box, fill: float) -> tuple[torch.Tensor, list[int]]:
        """The rows with their padding along the split axes, and the padding left to torch."""
        padding = list(self.padding)
        for axis, d in self.sliding.items():
            (start, stop), (lo, hi) = self.span(axis, box), reads[0].box[axis]
            x = pad_rows(x, d, lo - start if hi > lo else stop - start, stop - hi if hi > lo else 0, fill)
            padding[d - self.first] = 0
        return x, padding


class MaxPool(_Pool):
    """The largest under each window; padding never wins."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The pooled rows, or the places of the largest in the whole volume."""
        x = tensors[0]
        lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        x, padding = self.filled(x, reads, box, lowest)
        found = _MAX[self.n](
            x,
            self.kernel,
            self.stride,
            padding,
            self.dilation,
            ceil_mode=self.ceil,
            return_indices=self.value.pick == 1,
        )
        if self.value.pick != 1:
            return found
        return self._places(found[1], x.shape[self.first :], box)

    def _places(self, index: torch.Tensor, sizes: Sequence[int], box: Box) -> torch.Tensor:
        """Flat places in these rows as flat places in the whole volume."""
        at = []
        for size in reversed(sizes):
            at.append(index % size)
            index = index // size
        at.reverse()
        for axis, d in self.sliding.items():
            place = at[d - self.first] + self.span(axis, box)[0]
            # where all are -inf torch names the first row of the window that is not padding
            at[d - self.first] = torch.where(place < 0, place % self.dilation[d - self.first], place)
        whole = self.reads[0].shape[self.first :]
        flat = torch.zeros_like(at[0])
        for place, size in zip(at, whole, strict=True):
            flat = flat * size + place
        return flat


class AveragePool(_Pool):
    """The mean under each window, with torch's divisor at the ends."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The pooled rows."""
        x, padding = self.filled(tensors[0], reads, box, 0)
        divisor = self.args.get("divisor_override")
        if self.n == 1:  # torch's 1D pooling takes no divisor
            planar = ([1, k[0]] for k in (self.kernel, self.stride))
            total = F.avg_pool2d(x.unsqueeze(-2), *planar, [0, padding[0]], self.ceil, True, 1).squeeze(-2)
        else:
            total = _AVG[self.n](x, self.kernel, self.stride, padding, self.ceil, True, 1)
        return total / (divisor or self._divisors(box, env))

    def _divisors(self, box: Box, env: Env) -> torch.Tensor:
        """How many elements each window counts, as torch counts them."""
        count = torch.ones((), dtype=torch.float64, device=env.device)
        spans = {d - self.first: range_of(box, self.out, a) for a, d in self.sliding.items()}
        for i in range(self.n):
            lo, hi = spans.get(i, (0, self.value.shape[self.first + i]))
            rows = self.reads[0].shape[self.first + i]
            starts = torch.arange(lo, hi, device=env.device) * self.stride[i] - self.padding[i]
            stops = (starts + self.kernel[i]).clamp(max=rows + self.padding[i])
            if not self.args["count_include_pad"]:
                starts, stops = starts.clamp(min=0), stops.clamp(max=rows)
            count = count.unsqueeze(-1) * (stops - starts)
        return count.to(self.value.dtype)


class Adaptive(Step):
    """Adaptive pooling: each output row has its own window."""

    heavy = True

    def __init__(
        self, value: Value, natives: Sequence[Layout], ctx: Context, size: Sequence[int], largest: bool
    ) -> None:
        n = len(size)
        self.largest, self.n, self.first = largest, n, len(value.shape) - n
        source, out, self.sliding = window_layouts(natives[0], value.shape, ctx, self.first, n)
        if len(self.sliding) > 1:
            raise NoTileError("adaptive pooling along two split axes")
        super().__init__(value, value.refs(), [source], out)

    def _rows(self, lo: int, hi: int, axis: int) -> Range:
        d = self.sliding[axis]
        n, m = self.reads[0].shape[d], self.value.shape[d]
        return lo * n // m, -(-hi * n // m)

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The rows of the windows."""
        rows = list(self.same(0, box))
        for axis in self.sliding:
            rows[axis] = self._rows(*range_of(box, self.out, axis), axis)
        return (Read(0, tuple(rows)),)

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The windows one row at a time."""
        size = list(self.value.shape[self.first :])
        table: Any = (_MAX_ADAPTIVE if self.largest else _AVG_ADAPTIVE)[self.n]
        pool = lambda x: table(x, size)  # noqa: E731
        if not self.sliding:
            return pool(tensors[0])
        ((axis, d),) = self.sliding.items()
        lo, hi = range_of(box, self.out, axis)
        offset, parts = reads[0].box[axis][0], []
        size[d - self.first] = 1
        for row in range(lo, hi):
            a, b = self._rows(row, row + 1, axis)
            parts.append(pool(tensors[0].narrow(d, a - offset, b - a)))
        return torch.cat(parts, d)


@rule(
    [f"max_pool{n}d{tail}.default" for n in (1, 2, 3) for tail in ("", "_with_indices")],
    "pooling",
    "windows at global places",
)
def bind_max_pool(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Max pooling, with places or without."""
    return MaxPool(value, natives, ctx, int(str(value.target).split("pool")[1][0]))


@rule([f"avg_pool{n}d.default" for n in (1, 2, 3)], "pooling", "windows at global places, torch's divisors")
def bind_average_pool(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Average pooling."""
    return AveragePool(value, natives, ctx, int(str(value.target).split("pool")[1][0]))


@rule("halo.adaptive", "pooling", "windows of every output row")
def bind_adaptive(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Adaptive pooling left over from a partly global one."""
    return Adaptive(value, natives, ctx, value.args[1], value.args[2])


@rule(
    [f"adaptive_{kind}_pool{n}d.default" for kind in ("avg", "max") for n in (1, 2, 3)],
    "pooling",
    "windows of every output row",
)
def bind_adaptive_pool(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Adaptive pooling; places are computed whole."""
    size = value.args[1]
    size = list(size) if isinstance(size, (list, tuple)) else [size]
    name = str(value.target)
    if value.pick == 1:
        raise NoTileError("places of adaptive pooling")
    return Adaptive(value, natives, ctx, size, "max" in name)

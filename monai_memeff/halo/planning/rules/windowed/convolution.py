"""Convolution in any legal combination: kernel, stride, dilation, padding beyond the kernel's reach, groups, `same`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from monai_memeff.halo.planning.layout import Box, Layout
from monai_memeff.halo.planning.program import Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, arguments
from monai_memeff.halo.planning.rules.table import rule
from monai_memeff.halo.planning.rules.windowed.kernels import convolve
from monai_memeff.halo.planning.rules.windowed.windows import clipped, pad_rows, range_of, tuple_of, window_layouts


class DirectConvolution(Step):
    """Rows of a convolution from the rows under its kernel."""

    heavy = True

    def __init__(self, value: Value, natives: Sequence[Layout], ctx: Context) -> None:
        args = arguments(value)
        kernel = natives[1].shape[2:]
        n = len(kernel)
        self.stride, self.dilation = tuple_of(args["stride"], n, 1), tuple_of(args["dilation"], n, 1)
        self.groups = args["groups"] or 1
        self.kernel, self.first = kernel, len(value.shape) - n
        self.before, self.after = _padding(args["padding"], kernel, self.dilation)
        source, out, self.sliding = window_layouts(natives[0], value.shape, ctx, self.first, n)
        super().__init__(value, value.refs(), [source, *(ctx.whole(x.shape) for x in natives[1:])], out)

    def span(self, axis: int, box: Box) -> tuple[int, int]:
        """The rows under the kernel along a split axis, those of the padding included."""
        i = self.sliding[axis] - self.first
        lo, hi = range_of(box, self.out, axis)
        start = lo * self.stride[i] - self.before[i]
        return start, start + (hi - lo - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The rows under the kernel, without the padding."""
        rows = list(self.same(0, box))
        for axis in self.sliding:
            rows[axis] = clipped(*self.span(axis, box), self.reads[0].rows[axis])
        return Read(0, tuple(rows)), *(Read(i, self.reads[i].whole) for i in range(1, len(self.inputs)))

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The convolution of the padded rows."""
        x, weight = tensors[0], tensors[1]
        bias = tensors[2] if len(tensors) > 2 else None
        before, after = list(self.before), list(self.after)
        for axis, d in self.sliding.items():
            span, (lo, hi) = self.span(axis, box), reads[0].box[axis]
            i = d - self.first
            before[i], after[i] = lo - span[0] if hi > lo else span[1] - span[0], span[1] - hi if hi > lo else 0
        common = [min(b, a) for b, a in zip(before, after, strict=True)]
        for i, (b, a, c) in enumerate(zip(before, after, common, strict=True)):
            x = pad_rows(x, self.first + i, b - c, a - c)
        return convolve(x, weight, bias, self.stride, common, self.dilation, self.groups)

    def work(self) -> int:
        """One for each result and weight of its channel."""
        return math.prod(self.value.shape) * math.prod(self.reads[1].shape[1:])


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[list[int], list[int]]:
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [t // 2 for t in totals], [t - t // 2 for t in totals]
    pads = [0] * len(kernel) if padding == "valid" else tuple_of(padding, len(kernel), 0)
    return list(pads), list(pads)


@rule(["conv1d", "conv2d", "conv3d"], "convolution", "rows under the kernel; padding at the volume's ends only")
def bind_convolution(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A convolution's step."""
    return DirectConvolution(value, natives, ctx)

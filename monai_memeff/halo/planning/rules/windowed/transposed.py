"""Transposed convolution in any legal combination, output padding and dilation included."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from monai_memeff.halo.planning.layout import Box, Layout, Range
from monai_memeff.halo.planning.program import Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, arguments
from monai_memeff.halo.planning.rules.table import rule
from monai_memeff.halo.planning.rules.windowed.kernels import transpose
from monai_memeff.halo.planning.rules.windowed.windows import clipped, pad_rows, range_of, tuple_of, window_layouts

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class TransposedConvolution(Step):
    """Output rows from every input row that reaches them."""

    heavy = True

    def __init__(self, value: Value, natives: Sequence[Layout], ctx: Context) -> None:
        args = arguments(value)
        self.kernel = natives[1].shape[2:]
        n = len(self.kernel)
        self.stride, self.dilation = tuple_of(args["stride"], n, 1), tuple_of(args["dilation"], n, 1)
        self.padding, self.extra = tuple_of(args["padding"], n, 0), tuple_of(args["output_padding"], n, 0)
        self.groups, self.first = args["groups"] or 1, len(value.shape) - n
        source, out, self.sliding = window_layouts(natives[0], value.shape, ctx, self.first, n)
        super().__init__(value, value.refs(), [source, *(ctx.whole(x.shape) for x in natives[1:])], out)

    def _source(self, axis: int, box: Box) -> Range:
        i = self.sliding[axis] - self.first
        lo, hi = range_of(box, self.out, axis)
        s, p = self.stride[i], self.padding[i]
        first = -(-(lo + p - self.dilation[i] * (self.kernel[i] - 1)) // s)
        return clipped(first, (hi - 1 + p) // s + 1, self.reads[0].rows[axis])

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The rows that reach the output rows."""
        rows = list(self.same(0, box))
        for axis in self.sliding:
            rows[axis] = self._source(axis, box)
        return Read(0, tuple(rows)), *(Read(i, self.reads[i].whole) for i in range(1, len(self.inputs)))

    def work(self) -> int:
        """One for each number of the input and weight of its channel."""
        return math.prod(self.reads[0].shape) * math.prod(self.reads[1].shape[1:])

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The transposed convolution of these rows, cut to the output rows."""
        x, weight = tensors[0], tensors[1]
        bias = tensors[2] if len(tensors) > 2 else None
        padding, extra = list(self.padding), list(self.extra)
        for d in self.sliding.values():
            padding[d - self.first] = extra[d - self.first] = 0
        function = _TRANSPOSED[len(self.kernel)]
        if 0 in x.shape:
            y = x.new_zeros(self.out.part_shape(box))
            return y if bias is None else y + self._column(bias)
        short = self._short(reads, box)
        y = transpose(
            function, x, weight, None if short else bias, self.stride, padding, extra, self.groups, self.dilation
        )
        for axis, d in self.sliding.items():
            left, right = self._ends(axis, reads, box)
            start, stop = max(-left, 0), y.shape[d] - max(-right, 0)
            y = y.narrow(d, start, stop - start)
            y = pad_rows(y, d, max(left, 0), max(right, 0))
        return y + self._column(bias) if short and bias is not None else y

    def _column(self, bias: torch.Tensor) -> torch.Tensor:
        return bias.view(-1, *[1] * len(self.kernel))

    def _ends(self, axis: int, reads: Sequence[Read], box: Box) -> Range:
        """Rows to add (or, negative, to cut) before and after the plain result of the rows read."""
        i = self.sliding[axis] - self.first
        lo, hi = range_of(box, self.out, axis)
        a, b = reads[0].box[axis]
        first = a * self.stride[i] - self.padding[i]
        last = first + (b - a - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1
        return first - lo, hi - last

    def _short(self, reads: Sequence[Read], box: Box) -> bool:
        """Whether some output rows are reached by no input row: these hold the bias alone."""
        return any(n > 0 for axis in self.sliding for n in self._ends(axis, reads, box))


@rule(
    ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"],
    "convolution",
    "every row that reaches the output rows",
)
def bind_transposed(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A transposed convolution's step."""
    return TransposedConvolution(value, natives, ctx)

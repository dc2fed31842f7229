"""Resizing of every mode, by size or by factor, with torch's own index arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Layout, Range
from monai_memeff.halo.planning.program import Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, arguments
from monai_memeff.halo.planning.rules.table import rule
from monai_memeff.halo.planning.rules.windowed.windows import range_of, window_layouts

aten = torch.ops.aten
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CUBIC = -0.75  # torch's coefficient


def _scale(rows: int, size: int, factor: float | None, align: bool) -> float:
    """Input rows per output row, as torch computes it (aten/native/UpSample.h, read in 2.6 to 2.14)."""
    if align:
        return (rows - 1) / (size - 1) if size > 1 else 0.0
    return 1.0 / factor if factor is not None and factor > 0 else rows / size


class Taps:
    """For every output row along one dimension the input rows it is mixed from, and their weights."""

    def __init__(self, mode: str, rows: int, size: int, factor: float | None, align: bool, wide: bool) -> None:
        self.mode, self.rows = mode, rows
        dtype = torch.float64 if wide and not mode.startswith("nearest") else torch.float32
        row = torch.arange(size, dtype=dtype)
        scale = torch.tensor(_scale(rows, size, factor, align), dtype=dtype)
        if mode == "nearest":
            self._nearest(torch.floor(row * scale))
        elif mode == "nearest-exact":
            self._nearest(torch.floor((row + 0.5) * scale))
        else:
            place = row * scale if align else (row + 0.5) * scale - 0.5
            self._linear(place.clamp(min=0)) if mode == "linear" else self._cubic(place)

    def _nearest(self, place: torch.Tensor) -> None:
        self.index = [place.long().clamp(0, self.rows - 1)]
        self.weight = [torch.ones_like(place)]

    def _linear(self, place: torch.Tensor) -> None:
        first = place.floor().long().clamp(max=self.rows - 1)
        share = (place - first).clamp(0, 1)
        self.index = [first, (first + 1).clamp(max=self.rows - 1)]
        self.weight = [1 - share, share]

    def _cubic(self, place: torch.Tensor) -> None:
        first = place.floor()
        t, a = place - first, _CUBIC
        near = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1  # noqa: E731
        far = lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a  # noqa: E731
        self.index = [(first.long() + k).clamp(0, self.rows - 1) for k in (-1, 0, 1, 2)]
        self.weight = [far(t + 1), near(t), near(1 - t), far(2 - t)]

    def span(self, lo: int, hi: int) -> Range:
        """The input rows of output rows [lo, hi)."""
        used = torch.stack([i[lo:hi] for i in self.index])
        return int(used.min()), int(used.max()) + 1

    def mix(self, x: torch.Tensor, dim: int, lo: int, hi: int, first: int) -> torch.Tensor:
        """Output rows [lo, hi) along `dim` of the input rows from `first` on."""
        if len(self.index) == 1:
            return x.index_select(dim, (self.index[0][lo:hi] - first).to(x.device))
        shape = [1] * x.dim()
        shape[dim] = hi - lo
        total: Any = 0
        for index, weight in zip(self.index, self.weight, strict=True):
            share = weight[lo:hi].to(x.device, x.dtype).view(shape)
            total = total + x.index_select(dim, (index[lo:hi] - first).to(x.device)) * share
        return total


_KINDS = {
    "upsample_nearest1d": "nearest", "upsample_nearest2d": "nearest", "upsample_nearest3d": "nearest",
    "_upsample_nearest_exact1d": "nearest-exact", "_upsample_nearest_exact2d": "nearest-exact",
    "_upsample_nearest_exact3d": "nearest-exact", "upsample_linear1d": "linear", "upsample_bilinear2d": "linear",
    "upsample_trilinear3d": "linear", "upsample_bicubic2d": "cubic",
}  # fmt: skip


class Resizing(Step):
    """The split axes by taps, or by torch on whole multiples; the other axes by torch."""

    heavy = True

    def __init__(self, value: Value, natives: Sequence[Layout], ctx: Context) -> None:
        self.packet = str(value.target).split(".")[1]
        self.mode = _KINDS[self.packet]
        args = arguments(value)
        n = len(value.shape) - 2
        self.align = bool(args.get("align_corners"))
        factors = args.get("scale_factors")
        if factors is None:
            factors = (
                [args.get(k) for k in ("scales_d", "scales_h", "scales_w")][-n:] if n > 1 else [args.get("scales")]
            )
        self.factors = list(factors) if factors else [None] * n
        source, out, self.sliding = window_layouts(natives[0], value.shape, ctx, 2, n)
        super().__init__(value, value.refs(), [source], out)
        if value.dtype not in _FLOATS and not self.mode.startswith("nearest"):
            raise NoTileError("rounded numbers")
        self.taps = {a: self._taps(d) for a, d in self.sliding.items()}
        self.times = {a: self._times(d) for a, d in self.sliding.items()}

    def work(self) -> int:
        """One for each result and tap."""
        taps = {"nearest": 1, "nearest-exact": 1, "linear": 2, "cubic": 4}[self.mode]
        return int(math.prod(self.value.shape) * taps ** (len(self.value.shape) - 2))

    def _taps(self, d: int) -> Taps:
        wide = self.value.dtype == torch.float64
        return Taps(self.mode, self.reads[0].shape[d], self.value.shape[d], self.factors[d - 2], self.align, wide)

    def _times(self, d: int) -> int:
        """Output rows for each input row, if a whole number and torch's kernel may be used on some rows; or 0."""
        rows, size, factor = self.reads[0].shape[d], self.value.shape[d], self.factors[d - 2]
        times = size // rows
        exact = times * rows == size and (factor is None or factor == times)
        return times if exact and not (self.align and self.mode in ("linear", "cubic")) else 0

    def _margin(self) -> int:
        return {"nearest": 0, "nearest-exact": 0, "linear": 1, "cubic": 2}[self.mode]

    def _by_torch(self, axis: int, wanted: int) -> bool:
        """Whether so many rows are best cut from what torch's kernel makes of whole input rows: up to twice as many."""
        times = self.times[axis]
        if not times:
            return False
        read = (wanted + times - 2) // times + 1 + 2 * self._margin()
        return min(read, self.reads[0].rows[axis]) * times <= 2 * wanted

    def _span(self, axis: int, box: Box) -> Range:
        lo, hi = range_of(box, self.out, axis)
        if not self._by_torch(axis, hi - lo):
            return self.taps[axis].span(lo, hi)
        rows, m = self.reads[0].rows[axis], self._margin()
        return max(lo // self.times[axis] - m, 0), min(-(-hi // self.times[axis]) + m, rows)

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The rows that are mixed."""
        rows = list(self.same(0, box))
        for axis in self.sliding:
            rows[axis] = self._span(axis, box)
        return (Read(0, tuple(rows)),)

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The resized rows."""
        x = tensors[0]
        sizes, factors = list(self.value.shape[2:]), list(self.factors)
        half = x.dtype in (torch.float16, torch.bfloat16) and self.mode in ("linear", "cubic")
        x = x.float() if half else x
        crops = []
        for axis, d in self.sliding.items():
            lo, hi = range_of(box, self.out, axis)
            first, last = reads[0].box[axis]
            if self._by_torch(axis, hi - lo):
                times = self.times[axis]
                sizes[d - 2], factors[d - 2] = (last - first) * times, float(times)
                crops.append((d, lo - first * times, hi - lo))
            else:
                x = self.taps[axis].mix(x, d, lo, hi, first)
                sizes[d - 2], factors[d - 2] = hi - lo, None
        x = self._native(x, sizes, factors)
        for d, start, length in crops:
            x = x.narrow(d, start, length)
        return x.to(self.value.dtype)

    def _native(self, x: torch.Tensor, sizes: list[int], factors: list[Any]) -> torch.Tensor:
        if list(x.shape[2:]) == sizes and all(f is None for f in factors):
            return x
        kernel = getattr(aten, self.packet).default
        align = [self.align] if self.mode in ("linear", "cubic") else []
        result: torch.Tensor = kernel(x, sizes, *align, *factors)
        return result


@rule(list(_KINDS), "resize", "torch's index arithmetic at global rows")
def bind_resize(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A resize without antialiasing (with it, the operator runs whole)."""
    return Resizing(value, natives, ctx)

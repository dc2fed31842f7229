"""Integer arithmetic of windows: which input rows an output row needs, and the padding at a volume's ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Dim, Layout, Range, along
from monai_memeff.halo.planning.rules.base import Context


def tuple_of(value: Any, n: int, default: Any = None) -> list[Any]:
    """A number or a list of one or n numbers as n numbers."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        value = default
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    return found * n if len(found) == 1 else found


def clipped(lo: int, hi: int, rows: int) -> Range:
    """The part of [lo, hi) inside [0, rows); empty ranges stay inside."""
    lo = min(max(lo, 0), rows)
    return lo, max(min(hi, rows), lo)


def pad_rows(x: torch.Tensor, dim: int, left: int, right: int, fill: float = 0.0) -> torch.Tensor:
    """Rows of a constant before and after."""
    if not left and not right:
        return x
    pads = [0, 0] * (x.dim() - 1 - dim) + [left, right]
    return F.pad(x, pads, value=fill)


def window_layouts(
    native: Layout, shape: Sequence[int], ctx: Context, first: int, count: int
) -> tuple[Layout, Layout, dict[int, int]]:
    """Layouts of the input and output of an operator that slides over `count` dimensions from `first` on.

    Returns:
        The input's, the output's, and for every split axis that slides its dimension.

    Raises:
        NoTileError: if the input is spread over a dimension that the operator mixes (channels).
    """
    axes = len(ctx.axes)
    sliding: dict[int, int] = {}
    through: dict[int, Dim] = {}
    for axis in range(axes):
        d = native.dim_of(axis)
        if d is None:
            d = first + ctx.axes[axis]
            # a whole tensor may be cut anywhere; a pooled vector of one row is not worth it
            if count != ctx.dims or native.shape[d] < 2 or shape[d] < 2:
                continue
        if d == 0 and first == 2 and sum(a >= 0 for _, a in native.dims[0]) == 1:
            through[0] = native.dims[0]
            continue
        if not first <= d < first + count:
            raise NoTileError("the split axis lies in a dimension that the operator mixes")
        if d in sliding.values():
            raise NoTileError("two split axes lie in one dimension")
        sliding[axis] = d
    source = along(native.shape, sliding, axes)
    out = along(shape, {a: d for a, d in sliding.items() if shape[d] > 1}, axes)
    if through:
        source = Layout((through[0], *source.dims[1:]), axes)
        out = Layout((through[0], *out.dims[1:]), axes)
    return source, out, sliding


def range_of(box: Sequence[Range], out: Layout, axis: int) -> Range:
    """The output rows of a box along an axis; the only one where the output is not spread."""
    return box[axis] if out.places[axis] is not None else (0, 1)

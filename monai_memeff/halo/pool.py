"""Pooling on one part of a volume, equal to pooling of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from monai_memeff.geometry import Stencil
from monai_memeff.halo import arithmetic as ints
from monai_memeff.halo.arithmetic import Bounds, Span
from monai_memeff.halo.conv import Taps, new_layout, per_part, spread
from monai_memeff.halo.exchange import all_sum, window
from monai_memeff.halo.region import Layout, Region

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _gathered(
    region: Region, x: torch.Tensor, taps: Taps, fill: float, ceil: bool
) -> tuple[torch.Tensor, Layout, list[list[int]]]:
    """The rows that this rank's pooling windows read, the output's layout, and padding left to torch per axis."""
    bounds, at = spread(region, x), [d + region.spatial_dims for d in region.dims]
    k, s, d, p = ([v[i] for i in at] for v in (taps.kernel, taps.stride, taps.dilation, taps.low))
    sizes = [ints.conv_size(b[-1], k[a], s[a], p[a], p[a], d[a], ceil) for a, b in enumerate(bounds)]
    out_bounds = [ints.down_bounds(b, n, t) for b, n, t in zip(bounds, sizes, s, strict=False)]
    layout = new_layout(region, out_bounds)
    wanted = per_part(out_bounds, lambda a, o: Stencil(k[a], s[a], d[a], p[a]).inputs_of(*o))
    plan = ints.plan(region.comm.rank, bounds, wanted)
    if plan.receives or plan.sends or plan.window != plan.own:
        x = window(region.comm, region.dims, x, plan, fill)
    return x, layout, [[0 if i in at else taps.low[i] for i in range(region.spatial_dims)]]


def max_pool(region: Region, x: torch.Tensor, taps: Taps, ceil: bool = False) -> torch.Tensor:
    """Maximum over windows; beyond the volume's border counts as minus infinity, as in torch."""
    wide, layout, (padding,) = _gathered(region, x, taps, float("-inf"), ceil)
    y = _MAX[region.spatial_dims](wide, taps.kernel, taps.stride, padding, taps.dilation, ceil)
    return region.tag(y, layout)


def average_pool(
    region: Region,
    x: torch.Tensor,
    taps: Taps,
    ceil: bool = False,
    include_pad: bool = True,
    divisor: int | None = None,
) -> torch.Tensor:
    """Mean over windows, with torch's three ways of counting the padding."""
    bounds = spread(region, x)
    wide, layout, (padding,) = _gathered(region, x, taps, 0.0, ceil)
    run = _AVERAGE[region.spatial_dims]
    if region.spatial_dims == 1:
        y = run(wide, taps.kernel, taps.stride, padding, ceil, include_pad)
    else:
        y = run(wide, taps.kernel, taps.stride, padding, ceil, include_pad, divisor)
    if divisor is None:
        y = _recount(region, y, taps, bounds, layout, include_pad)
    return region.tag(y, layout)


def _recount(
    region: Region, y: torch.Tensor, taps: Taps, bounds: Sequence[Bounds], layout: Layout, include_pad: bool
) -> torch.Tensor:
    """Correct the divisor of windows that reach beyond the volume along a split axis."""
    for dim, b, out, p in zip(region.dims, bounds, layout.bounds, region.mesh.position, strict=False):
        i = dim + region.spatial_dims
        assert out is not None
        k, s, pad = taps.kernel[i], taps.stride[i], taps.low[i]
        rim = pad if include_pad else 0
        rows = range(out[p], out[p + 1])
        counts = [min(o * s - pad + k, b[-1] + rim) - max(o * s - pad, -rim) for o in rows]
        if any(c != k for c in counts):
            factors = torch.tensor([k / c for c in counts], dtype=y.dtype, device=y.device)
            y = y * factors.view(-1, *[1] * (-dim - 1))
    return y


def _cell(out: Span, size: int, cells: int) -> Span:
    """Rows that adaptive pooling reads for output rows `out`."""
    return out[0] * size // cells, -(-out[1] * size // cells)


def adaptive_pool(region: Region, x: torch.Tensor, output_size: Sequence[int | None], maximum: bool) -> torch.Tensor:
    """Adaptive pooling; an output of one row on every split axis is global and held by every rank.

    Raises:
        NotPartitionable: if the output has more than one but fewer rows than parts.
    """
    bounds = spread(region, x)
    spatial = x.shape[-region.spatial_dims :]
    target = [n if t is None else t for t, n in zip(output_size, spatial, strict=False)]
    at = [d + region.spatial_dims for d in region.dims]
    wanted_rows = [b[-1] if output_size[i] is None else target[i] for i, b in zip(at, bounds, strict=False)]
    if all(n == 1 for n in wanted_rows):
        return _global_pool(region, x, bounds, target, at, maximum)
    cuts = [ints.cut(n, len(b) - 1) for n, b in zip(wanted_rows, bounds, strict=False)]
    layout = new_layout(region, cuts)
    windows = per_part(cuts, lambda a, o: _cell(o, bounds[a][-1], wanted_rows[a]))
    plan = ints.plan(region.comm.rank, bounds, windows)
    wide = window(region.comm, region.dims, x, plan)
    for dim, w, rows, b, p in zip(
        region.dims, plan.window, wanted_rows, layout.bounds, region.mesh.position, strict=False
    ):
        assert b is not None
        cells = [
            _cell((o, o + 1), spread_size, rows)
            for spread_size in [_size(bounds, region, dim)]
            for o in range(b[p], b[p + 1])
        ]
        wide = _reduce_cells(wide, dim, [(lo - w[0], hi - w[0]) for lo, hi in cells], maximum)
    rest = [wide.shape[i - region.spatial_dims] if i in at else target[i] for i in range(region.spatial_dims)]
    return region.tag(_adaptive(region, wide, rest, maximum), layout)


def _size(bounds: Sequence[Bounds], region: Region, dim: int) -> int:
    return bounds[region.dims.index(dim)][-1]


def _reduce_cells(x: torch.Tensor, dim: int, cells: list[Span], maximum: bool) -> torch.Tensor:
    rows = [x.narrow(dim, lo, hi - lo) for lo, hi in cells]
    return torch.cat([r.amax(dim, keepdim=True) if maximum else r.mean(dim, keepdim=True) for r in rows], dim)


def _adaptive(region: Region, x: torch.Tensor, size: Sequence[int], maximum: bool) -> torch.Tensor:
    table: Any = (
        (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
        if maximum
        else (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    )
    return table[region.spatial_dims - 1](x, tuple(size))


def _global_pool(
    region: Region, x: torch.Tensor, bounds: Sequence[Bounds], target: list[int], at: list[int], maximum: bool
) -> torch.Tensor:
    local = [1 if i in at else target[i] for i in range(region.spatial_dims)]
    y = _adaptive(region, x, local, maximum)
    if maximum:
        y = _all_max(region, y)
    else:
        share = 1.0
        for dim, b in zip(region.dims, bounds, strict=False):
            share *= x.shape[dim] / b[-1]
        y = all_sum(region.comm, y * share)
    return region.tag(y, Layout((None,) * len(region.dims)))


def _all_max(region: Region, y: torch.Tensor) -> torch.Tensor:
    """Maximum over ranks; the gradient goes to the ranks that hold it, in equal shares."""
    top = torch.stack(region.comm.all_gather(y.detach().contiguous())).amax(0)
    holds = (y.detach() == top).to(y.dtype)
    holders = region.comm.all_reduce(holds.clone())
    return all_sum(region.comm, y * holds / holders)

"""Transposed convolution on one part of a volume, equal to that of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from monai_memeff.geometry import Stencil
from monai_memeff.halo import arithmetic as ints
from monai_memeff.halo.arithmetic import Span
from monai_memeff.halo.conv import Taps, cast, new_layout, per_part, spread
from monai_memeff.halo.exchange import window
from monai_memeff.halo.region import Margin, Region, margin_of, set_margin

TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def transposed(
    region: Region,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    taps: Taps,
    extra: Sequence[int],
    groups: int = 1,
) -> torch.Tensor:
    """Transposed convolution of this rank's rows as part of the whole volume.

    Args:
        region: what the network's layers share.
        x: local tensor (B, C, spatial...).
        weight: kernel as for `torch.nn.functional.conv_transpose3d`.
        bias: bias or None.
        taps: kernel geometry; `low` is the padding.
        extra: output padding per spatial axis.
        groups: as in torch.
    """
    x, weight, bias = cast(x, weight, bias)
    bounds = spread(region, x)
    at = [d + region.spatial_dims for d in region.dims]
    k, s, d, p, e = ([v[i] for i in at] for v in (taps.kernel, taps.stride, taps.dilation, taps.low, extra))
    stencils = [Stencil(*a, transposed=True) for a in zip(k, s, d, p, e, strict=True)]
    sizes = [stencil.output_size(b[-1]) for stencil, b in zip(stencils, bounds, strict=True)]
    out_bounds = [ints.up_bounds(b, n, t) for b, n, t in zip(bounds, sizes, s, strict=False)]
    layout = new_layout(region, out_bounds)
    wanted = per_part(out_bounds, lambda a, o: _inside(stencils[a].inputs_of(*o), bounds[a][-1]))
    plan = ints.plan(region.comm.rank, bounds, wanted)
    wide = x
    if plan.receives or plan.sends or plan.window != plan.own:
        wide = window(region.comm, region.dims, x, plan)
    padding, output_padding, crops = list(taps.low), list(extra), []
    for a, i in enumerate(at):
        b = layout.bounds[a]
        assert b is not None
        low, high = b[region.mesh.position[a]], b[region.mesh.position[a] + 1]
        offset = low - (plan.window[a][0] * s[a] - p[a])
        length = (plan.window[a][1] - plan.window[a][0] - 1) * s[a] + d[a] * (k[a] - 1) + 1
        exact = offset == p[a] and high - low - length + 2 * p[a] < max(s[a], d[a])
        padding[i] = p[a] if exact else 0
        start_row = 0 if exact else offset
        output_padding[i] = max(start_row + high - low - length + 2 * padding[i], 0)
        crops.append((region.dims[a], start_row, high - low))
    run = TRANSPOSED[region.spatial_dims]
    y = run(wide, weight, bias, taps.stride, tuple(padding), tuple(output_padding), groups, taps.dilation)
    for dim, offset, rows in crops:
        y = y.narrow(dim, offset, rows) if y.shape[dim] != rows else y
    return set_margin(region.tag(y.contiguous(), layout), _grown_margin(x, weight, bias, taps, extra, groups, at))


def _inside(span: Span, size: int) -> Span:
    return max(span[0], 0), min(span[1], size)


def _grown_margin(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, taps: Taps, extra: Sequence[int], groups: int, at: list[int]
) -> Margin | None:
    """When kernel equals stride each input row writes rows of its own, so the margin can be enlarged alone."""
    margin = margin_of(x)
    plain = taps.kernel == taps.stride and not any((*taps.low, *extra)) and all(n == 1 for n in taps.dilation)
    if margin is None or not plain:
        return None
    run, pieces = TRANSPOSED[len(taps.kernel)], {}
    for box, rows in margin.pieces.items():
        larger = tuple((lo * taps.stride[i], hi * taps.stride[i]) for (lo, hi), i in zip(box, at, strict=False))
        pieces[larger] = run(rows, weight, bias, taps.stride, groups=groups)
    return Margin(margin.width * min(taps.stride), pieces)

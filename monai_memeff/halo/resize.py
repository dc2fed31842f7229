"""Interpolation on one part of a volume, equal to that of the whole: coordinates are those of the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from monai_memeff.halo import arithmetic as ints
from monai_memeff.halo.arithmetic import Bounds, Span
from monai_memeff.halo.conv import new_layout, spread
from monai_memeff.halo.exchange import window
from monai_memeff.halo.region import Region

LINEAR = ("linear", "bilinear", "trilinear")
MODES = (*LINEAR, "nearest", "nearest-exact")
Taps2 = tuple[int, int, float]  # lower row, upper row, weight of the upper row


def source_taps(row: int, size: int, new_size: int, scale: float | None, mode: str, corners: bool) -> Taps2:
    """Input rows (global) and the weight that make up one output row, as torch counts them.

    Args:
        row: output row of the whole volume.
        size: input rows of the whole volume.
        new_size: output rows of the whole volume.
        scale: the scale factor, if one was given instead of a size.
        mode: linear, nearest or nearest-exact (or torch's names for more axes).
        corners: `align_corners`.
    """
    ratio = 1.0 / scale if scale else size / new_size
    if mode == "nearest":
        low = min(math.floor(row * ratio), size - 1)
        return low, low, 0.0
    if mode == "nearest-exact":
        low = min(math.floor((row + 0.5) * ratio), size - 1)
        return low, low, 0.0
    if corners:
        at = row * (size - 1) / (new_size - 1) if new_size > 1 else 0.0
    else:
        at = max((row + 0.5) * ratio - 0.5, 0.0)
    low = min(math.floor(at), size - 1)
    return low, min(low + 1, size - 1), min(at - low, 1.0)


def _new_sizes(
    region: Region, bounds: Sequence[Bounds], size: Sequence[int] | None, scale: Sequence[float] | None
) -> list[int]:
    at = [d + region.spatial_dims for d in region.dims]
    if size is not None:
        return [size[i] for i in at]
    if scale is None:
        raise region.fail("interpolation needs a size or a scale factor.")
    return [math.floor(b[-1] * scale[i]) for i, b in zip(at, bounds, strict=False)]


def resize_part(
    region: Region,
    x: torch.Tensor,
    size: Sequence[int] | None,
    scale: Sequence[float] | None,
    mode: str,
    corners: bool,
    fixed_scale: bool = True,
) -> torch.Tensor:
    """Resize this rank's rows as part of the whole volume.

    Args:
        region: what the network's layers share.
        x: local tensor (B, C, spatial...).
        size: size of the whole output per spatial axis, or None.
        scale: factor per spatial axis, or None.
        mode: nearest, nearest-exact, linear, bilinear or trilinear.
        corners: `align_corners`.
        fixed_scale: whether the factor given (and not the ratio of sizes) sets the coordinates, torch's default.

    Raises:
        NotPartitionable: for another mode.
    """
    if mode not in MODES:
        raise region.fail(f"interpolation mode '{mode}' is not supported on a part of a volume; use one of {MODES}.")
    bounds = spread(region, x)
    at = [d + region.spatial_dims for d in region.dims]
    sizes = _new_sizes(region, bounds, size, scale)
    cuts = [(0, *(c * n // b[-1] for c in b[1:-1]), n) for b, n in zip(bounds, sizes, strict=False)]
    layout = new_layout(region, cuts)
    used = [scale[i] if scale is not None and fixed_scale else None for i in at]
    tables = [
        [source_taps(r, b[-1], n, f, mode, corners) for r in range(n)]
        for b, n, f in zip(bounds, sizes, used, strict=False)
    ]
    x = _other_axes(region, x, size, scale, mode, corners, fixed_scale, at)
    windows = tuple(tuple(_reach(t, o) for o in itertools.pairwise(c)) for t, c in zip(tables, cuts, strict=False))
    plan = ints.plan(region.comm.rank, bounds, windows)
    if plan.receives or plan.sends or plan.window != plan.own:
        x = window(region.comm, region.dims, x, plan)
    for dim, table, c, p, w in zip(region.dims, tables, cuts, region.mesh.position, plan.window, strict=False):
        x = _mix(x, dim, table[c[p] : c[p + 1]], w[0])
    return region.tag(x, layout)


def _reach(table: list[Taps2], out: Span) -> Span:
    rows = table[out[0] : out[1]]
    return min(r[0] for r in rows), max(r[1] for r in rows) + 1


def _other_axes(
    region: Region,
    x: torch.Tensor,
    size: Sequence[int] | None,
    scale: Sequence[float] | None,
    mode: str,
    corners: bool,
    fixed_scale: bool,
    at: list[int],
) -> torch.Tensor:
    """Interpolate the axes that are not split by torch itself (interpolation is separable)."""
    if len(at) == region.spatial_dims:
        return x
    flag = corners if mode in LINEAR else None
    local = x.shape[-region.spatial_dims :]
    if size is not None:
        target = [local[i] if i in at else size[i] for i in range(region.spatial_dims)]
        return F.interpolate(x, size=target, mode=mode, align_corners=flag)
    assert scale is not None
    factors = [1.0 if i in at else float(scale[i]) for i in range(region.spatial_dims)]
    again = None if fixed_scale else True
    return F.interpolate(x, scale_factor=factors, mode=mode, align_corners=flag, recompute_scale_factor=again)


def _mix(x: torch.Tensor, dim: int, rows: list[Taps2], origin: int) -> torch.Tensor:
    """Blend two input rows per output row along one axis."""
    low = torch.tensor([r[0] - origin for r in rows], device=x.device)
    y = x.index_select(dim, low)
    weights = [r[2] for r in rows]
    if not any(weights):
        return y
    high = torch.tensor([r[1] - origin for r in rows], device=x.device)
    weight = torch.tensor(weights, dtype=x.dtype, device=x.device).view(-1, *[1] * (-dim - 1))
    return torch.lerp(y, x.index_select(dim, high), weight)

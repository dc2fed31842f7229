"""Instance, batch and group normalisation with statistics of the whole volume, one reduction each way."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_memeff.halo import arithmetic as ints
from monai_memeff.halo.exchange import Flight
from monai_memeff.halo.region import Layout, Margin, Region, set_margin
from monai_memeff.halo.transport import Communicator

WIDENED = 2**24
"""Values of half precision that are made float32 at a time for their statistics."""


def _wide(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Statistics travel in float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over all but the channel axis of (B, C, N), in float32 at least."""
    if x.dtype in (torch.float16, torch.bfloat16):
        channels = max(WIDENED * x.shape[1] // x.numel(), 1)
        means, variances = zip(*(_moments(part.float()) for part in x.split(channels, dim=1)), strict=True)
        return torch.cat(means), torch.cat(variances)
    if x.device.type == "cpu":  # the kernel of batch norm: as exact as var_mean, in a quarter of its time
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        variance, mean = torch.var_mean(x, dim=(0, 2), correction=0)
    return mean, variance


@torch.no_grad()
def global_moments(x: torch.Tensor, comm: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance per channel of (B, C, N) over all ranks, and the number of values, by one reduction."""
    mean, variance = _moments(x)
    count = x.numel() // x.shape[1]
    mean64, variance64 = (t.to(_wide(x.dtype, x.device)) for t in (mean, variance))
    packed = torch.cat([mean64 * count, (variance64 + mean64 * mean64) * count, mean64.new_full((1,), count)])
    packed = comm.all_reduce(packed)
    channels, total = x.shape[1], packed[-1]
    center = packed[:channels] / total
    spread = (packed[channels:-1] / total - center * center).clamp_min(0)
    return center.to(mean.dtype), spread.to(mean.dtype), total


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias on (B, C, N), with the mean and variance of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        total: torch.Tensor,
        eps: float,
        comm: Communicator,
        shape: torch.Size,
    ) -> torch.Tensor:
        flat = x.reshape(*shape)
        y = torch.ops.aten.native_batch_norm(flat, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.comm, ctx.flat = eps, comm, shape
        return torch.ops.aten._unsafe_view(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        flat, g = x.reshape(*ctx.flat), gradient.reshape(*ctx.flat)
        inverse = (variance + ctx.eps).rsqrt()
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)  # CUDA sums nothing without one
        gx, g_weight, g_bias = torch.ops.aten.native_batch_norm_backward(
            g, flat, scale, mean, variance, mean, inverse, False, ctx.eps, [True, True, True]
        )
        wide = _wide(x.dtype, x.device)
        sums = ctx.comm.all_reduce(torch.cat([g_weight.to(wide), g_bias.to(wide)])) / total
        projection, center = sums.chunk(2)
        scale = inverse.to(wide) * scale.to(wide)
        slope = -(scale * inverse.to(wide) * projection)
        offset = -scale * center - slope * mean.to(wide)
        gx.addcmul_(flat, _row(slope, gx)).add_(_row(offset, gx))
        if weight is None:
            return (gx.reshape(x.shape), *[None] * 8)
        return (gx.reshape(x.shape), g_weight.to(weight.dtype), g_bias.to(weight.dtype), *[None] * 6)


def _row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def _apply(
    x: torch.Tensor, shape: Any, weight: Any, bias: Any, stats: Any, eps: float, comm: Communicator
) -> torch.Tensor:
    mean, variance, total = stats
    return _Normalise.apply(x.contiguous(), weight, bias, mean, variance, total, eps, comm, shape)


def _early_margin(region: Region, x: torch.Tensor, layout: Layout) -> Any:
    """In inference, send one raw row to each side before the statistics: the next convolution need not ask for it."""
    if torch.is_grad_enabled() or any(b is None for b in layout.bounds) or region.comm.size == 1:
        return None
    bounds = tuple(b for b in layout.bounds if b is not None)
    wanted = tuple(tuple((max(lo - 1, 0), min(hi + 1, b[-1])) for lo, hi in itertools.pairwise(b)) for b in bounds)
    plan = ints.plan(region.comm.rank, bounds, wanted)
    flight = Flight(region.comm, region.dims, plan)
    flight.send_rows(x)
    return flight


def _finish_margin(y: torch.Tensor, flight: Any, finish: Any) -> torch.Tensor:
    if flight is None:
        return y
    rows = flight.rows()
    return set_margin(y, Margin(1, {p.source: finish(r) for p, r in zip(flight.plan.receives, rows, strict=False)}))


def instance_norm(
    region: Region, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Instance normalisation over the whole volume; returns the local rows and (mean, variance, count) per (B * C)."""
    layout, batch = region.layout(x), x.shape[0]
    flight = _early_margin(region, x, layout)
    flat = (1, batch * x.shape[1], -1)
    stats = global_moments(x.reshape(*flat), region.comm)
    w, b = (None if t is None else t.repeat(batch) for t in (weight, bias))
    y = _apply(x, flat, w, b, stats, eps, region.comm)
    y = _finish_margin(y, flight, lambda r: _apply(r, flat, w, b, stats, eps, region.comm))
    return region.tag(y, layout), stats


def batch_norm(
    region: Region, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batch normalisation over batch and volume; returns the local rows and (mean, variance, count) per channel."""
    layout = region.layout(x)
    flight = _early_margin(region, x, layout)
    flat = (x.shape[0], x.shape[1], -1)
    stats = global_moments(x.reshape(*flat), region.comm)
    y = _apply(x, flat, weight, bias, stats, eps, region.comm)
    y = _finish_margin(y, flight, lambda r: _apply(r, flat, weight, bias, stats, eps, region.comm))
    return region.tag(y, layout), stats


def group_norm(
    region: Region, x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Group normalisation over the whole volume."""
    layout, batch, channels = region.layout(x), x.shape[0], x.shape[1]
    flight = _early_margin(region, x, layout)
    per_channel = (1, batch * channels, -1)
    stats = global_moments(x.reshape(1, batch * groups, -1), region.comm)
    mean, variance = (t.repeat_interleave(channels // groups) for t in stats[:2])
    y = _GroupNormalise.apply(x.contiguous(), mean, variance, stats[2], groups, eps, region.comm)
    y = _affine(y, weight, bias)

    def finish(rows: torch.Tensor) -> torch.Tensor:
        flat = torch.ops.aten.native_batch_norm(
            rows.reshape(*per_channel), None, None, mean, variance, False, 0.0, eps
        )[0]
        return _affine(flat.view(rows.shape), weight, bias)

    return region.tag(_finish_margin(y, flight, finish), layout)


def _affine(y: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    if weight is None or bias is None:
        return y
    view = (1, -1, *[1] * (y.dim() - 2))
    return torch.addcmul(bias.view(view), y, weight.view(view)).to(y.dtype)


class _GroupNormalise(torch.autograd.Function):
    """Normalisation without weights on groups of channels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        total: torch.Tensor,
        groups: int,
        eps: float,
        comm: Communicator,
    ) -> torch.Tensor:
        flat = x.reshape(1, x.shape[0] * x.shape[1], -1)
        y = torch.ops.aten.native_batch_norm(flat, None, None, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, mean, variance, total)
        ctx.eps, ctx.comm, ctx.groups = eps, comm, groups
        return torch.ops.aten._unsafe_view(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mean, variance, total = ctx.saved_tensors
        shape = (1, x.shape[0] * x.shape[1], -1)
        flat, g = x.reshape(*shape), gradient.reshape(*shape)
        inverse = (variance + ctx.eps).rsqrt()
        gx, projection, center = torch.ops.aten.native_batch_norm_backward(
            g, flat, torch.ones_like(mean), mean, variance, mean, inverse, False, ctx.eps, [True, True, True]
        )
        wide, rows = _wide(x.dtype, x.device), x.shape[0] * ctx.groups
        sums = torch.cat([t.to(wide).view(rows, -1).sum(1) for t in (projection, center)])
        sums = ctx.comm.all_reduce(sums) / total
        each = x.shape[1] // ctx.groups
        projection, center = (t.repeat_interleave(each) for t in sums.chunk(2))
        inverse = inverse.to(wide)
        slope = -(inverse * inverse * projection)
        offset = -inverse * center - slope * mean.to(wide)
        gx.addcmul_(flat, _row(slope, gx)).add_(_row(offset, gx))
        return (gx.reshape(x.shape), *[None] * 6)

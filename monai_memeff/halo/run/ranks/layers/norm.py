"""Instance, batch and group normalization with statistics of the whole volume, one reduction each way.

A rule's reduction and pointwise step would give the same numbers; torch's own kernels need a third of their memory in
training and run in half the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from monai_memeff.halo.run.ranks.comm.transport import Communicator

WIDENED = 2**24
"""Values of half precision that are made float32 at a time for their statistics."""
Statistics = tuple[torch.Tensor, torch.Tensor]  # mean and biased variance


@dataclass(frozen=True)
class Form:
    """Which values share their statistics.

    Attributes:
        batch: whether the batch shares them (batch normalization).
        groups: number of groups of channels that share them; None if every channel has its own.
        count: values of the whole behind each statistic.
    """

    batch: bool
    groups: int | None
    count: int

    def flat(self, x: torch.Tensor) -> tuple[int, int, int]:
        """(B, C, N) of rows (B, C, spatial...) whose second dimension has statistics of its own."""
        rows = x.shape[2:].numel()
        if self.batch:
            return x.shape[0], x.shape[1], rows
        if self.groups is not None:
            return 1, x.shape[0] * self.groups, rows * (x.shape[1] // self.groups)
        return 1, x.shape[0] * x.shape[1], rows


def _wide(device: torch.device) -> torch.dtype:
    """Statistics travel in float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over all but the channel axis of (B, C, N), in float32 at least."""
    if x.numel() == 0:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
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
def whole_moments(comm: Communicator, x: torch.Tensor) -> Statistics:
    """Mean and variance per channel of (B, C, N) over all ranks, by one gathering.

    Ranks combine their moments as Chan, Golub and LeVeque 1979 do: squares of large means never cancel.
    """
    mean, variance = _moments(x)
    wide = _wide(x.device)
    count = x.numel() // x.shape[1]
    row = torch.cat([mean.to(wide), variance.to(wide), mean.new_full((1,), count, dtype=wide)])
    rows = torch.stack(comm.all_gather(row))
    means, variances, counts = rows[:, : x.shape[1]], rows[:, x.shape[1] : -1], rows[:, -1:]
    total = counts.sum()
    center = (means * counts).sum(0) / total
    spread = ((variances + (means - center).square()) * counts).sum(0) / total
    return center.to(mean.dtype), spread.to(mean.dtype)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias on (B, C, N), with the mean and variance of all ranks.

    `merge` channels share their statistics (group normalization, without weights): their sums are added in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        eps: float,
        comm: Communicator,
        shape: tuple[int, ...],
        merge: int,
    ) -> torch.Tensor:
        mean, variance, total = statistics
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.comm, ctx.flat, ctx.merge = eps, comm, shape, merge
        if x.numel() == 0:
            return torch.empty_like(x)
        y = torch.ops.aten.native_batch_norm(x.reshape(shape), weight, bias, mean, variance, False, 0.0, eps)[0]
        return torch.ops.aten._unsafe_view(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)  # CUDA sums nothing without one
        inverse = (variance + ctx.eps).rsqrt()
        gx, g_weight, g_bias = _local_gradients(gradient, x, ctx.flat, scale, mean, variance, inverse, ctx.eps)
        slope, offset = _corrections(ctx, g_weight, g_bias, scale, mean, inverse, total)
        if x.numel():
            gx.addcmul_(x.reshape(ctx.flat), _row(slope, gx)).add_(_row(offset, gx))
        gx = gx.reshape(x.shape)
        if weight is None:
            return (gx, *[None] * 7)
        return (gx, g_weight.to(weight.dtype), g_bias.to(weight.dtype), *[None] * 5)


def _local_gradients(
    gradient: Any, x: Any, flat: Any, scale: Any, mean: Any, variance: Any, inverse: Any, eps: float
) -> Any:
    """Gradients as if the statistics were constants."""
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
    return torch.ops.aten.native_batch_norm_backward(
        gradient.reshape(flat), x.reshape(flat), scale, mean, variance, mean, inverse, False, eps, [True, True, True]
    )


def _corrections(ctx: Any, g_weight: Any, g_bias: Any, scale: Any, mean: Any, inverse: Any, total: Any) -> Any:
    """What the statistics' own dependence on x adds to its gradient: slope * x + offset per channel."""
    wide = _wide(mean.device)
    scale, inverse, mean = scale.to(wide), inverse.to(wide), mean.to(wide)
    if ctx.merge == 1:
        sums = ctx.comm.all_reduce(torch.cat([g_weight.to(wide), g_bias.to(wide)])) / total
        projection, center = (part * scale for part in sums.chunk(2))
    else:
        sums = torch.cat([t.to(wide).view(-1, ctx.merge).sum(1) for t in (g_weight, g_bias)])
        projection, center = (t.repeat_interleave(ctx.merge) for t in (ctx.comm.all_reduce(sums) / total).chunk(2))
    slope = -inverse * inverse * projection
    return slope, -inverse * center - slope * mean


def _row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def normalize(
    comm: Communicator,
    x: torch.Tensor,
    statistics: Statistics,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    form: Form,
) -> torch.Tensor:
    """This rank's rows, normalized; backward reaches x through the statistics too.

    Args:
        comm: this rank's communicator.
        x: this rank's rows (B, C, spatial...).
        statistics: mean and biased variance of the whole, in the order of `form`.
        weight: one factor per channel, or None.
        bias: one summand per channel, or None.
        eps: added to the variance.
        form: which values share their statistics.
    """
    batch, channels, rows = x.shape[0], x.shape[1], x.shape[2:].numel()
    merge = 1 if form.groups is None else channels // form.groups
    mean, variance = (t.repeat_interleave(merge) for t in statistics)
    total = torch.full((), form.count, dtype=_wide(x.device), device=x.device)
    shape = (batch, channels, rows) if form.batch else (1, batch * channels, rows)
    inside = merge == 1 and weight is not None and bias is not None
    if inside and not form.batch:
        affine = [None if t is None else t.repeat(batch) for t in (weight, bias)]
    else:
        affine = [weight, bias] if inside else [None, None]
    y = _Normalize.apply(x.contiguous(), *affine, (mean, variance, total), eps, comm, shape, merge)
    return y if inside else _affine(y, weight, bias)


def _affine(y: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    view = (1, -1, *[1] * (y.dim() - 2))
    if weight is not None and bias is not None:
        return torch.addcmul(bias.view(view), y, weight.view(view)).to(y.dtype)
    y = y if weight is None else (y * weight.view(view)).to(y.dtype)
    return y if bias is None else (y + bias.view(view)).to(y.dtype)

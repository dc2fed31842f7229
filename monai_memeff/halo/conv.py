"""Convolution on one part of a volume, equal to that of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from monai_memeff.geometry import Stencil
from monai_memeff.halo import arithmetic as ints
from monai_memeff.halo.arithmetic import Bounds, Span
from monai_memeff.halo.exchange import Flight, assemble, finish, start, strip_boxes, window
from monai_memeff.halo.padding import border, clip_for, pad_axis, pad_whole_axes
from monai_memeff.halo.region import Layout, Margin, Region, margin_of, set_margin

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Taps:
    """Kernel geometry along every spatial axis (tuples of one number per axis)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    dilation: tuple[int, ...]


def new_layout(region: Region, bounds: Sequence[Bounds]) -> Layout:
    """A layout of the given cuts.

    Raises:
        NotPartitionable: if a rank would be left without rows.
    """
    for axis, b in zip(region.mesh.axes, bounds, strict=False):
        if any(high <= low for low, high in itertools.pairwise(b)):
            raise region.fail(
                f"the volume is too small for {len(b) - 1} parts along spatial axis {axis}: cuts {b} leave a part "
                f"without rows; take fewer partitions or a larger volume."
            )
    return Layout(tuple(bounds))


def spread(region: Region, x: torch.Tensor) -> tuple[Bounds, ...]:
    """Cuts of a tensor that must really be spread over the ranks."""
    layout = region.layout(x)
    if any(b is None for b in layout.bounds):
        raise region.fail("cannot look past the edge of a globally pooled tensor.")
    return tuple(b for b in layout.bounds if b is not None)


def per_part(bounds: Sequence[Bounds], make: Any) -> tuple[tuple[Span, ...], ...]:
    """Windows of every part on every split axis; `make(axis, out_span)` gives one."""
    return tuple(tuple(make(a, span) for span in itertools.pairwise(b)) for a, b in enumerate(bounds))


class _AddThin(torch.autograd.Function):
    """Add thin results at the rim of a large one, in place, without copying gradients."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, places: list[tuple[int, int]], *thin: torch.Tensor) -> torch.Tensor:
        ctx.places, ctx.lengths = places, [t.shape[d] for t, (d, _) in zip(thin, places, strict=False)]
        ctx.mark_dirty(y)
        for t, (dim, at) in zip(thin, places, strict=False):
            y.narrow(dim, at, t.shape[dim]).add_(t)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slices = [gradient.narrow(d, at, n) for (d, at), n in zip(ctx.places, ctx.lengths, strict=False)]
        return (gradient, None, *slices)


def cast(*tensors: torch.Tensor | None) -> list[Any]:
    """Apply autocast before the exchange, so that halo rows travel in the compute precision."""
    kind = tensors[0].device.type if tensors[0] is not None else "cpu"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [None if t is None else t.to(torch.get_autocast_dtype(kind)) for t in tensors]


def conv(
    region: Region,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    taps: Taps,
    groups: int = 1,
    mode: str = "zeros",
) -> torch.Tensor:
    """Convolve this rank's rows as part of the whole volume.

    Args:
        region: what the network's layers share.
        x: local tensor (B, C, spatial...).
        weight: kernel as for `torch.nn.functional.conv3d`.
        bias: bias or None.
        taps: kernel geometry per spatial axis.
        groups: as in torch.
        mode: padding mode at the volume's border: zeros, reflect, replicate or circular.

    Returns:
        This rank's rows of the output.
    """
    x, weight, bias = cast(x, weight, bias)
    bounds = spread(region, x)
    x = pad_whole_axes(region, x, taps.low, taps.high, mode)
    at = [d + region.spatial_dims for d in region.dims]
    k, s, d, lo, hi = ([v[i] for i in at] for v in (taps.kernel, taps.stride, taps.dilation, taps.low, taps.high))
    sizes = [ints.conv_size(b[-1], *a) for b, *a in zip(bounds, k, s, lo, hi, d, strict=False)]
    out_bounds = [ints.down_bounds(b, n, t) for b, n, t in zip(bounds, sizes, s, strict=False)]
    layout = new_layout(region, out_bounds)
    wanted = per_part(out_bounds, lambda a, o: Stencil(k[a], s[a], d[a], lo[a]).inputs_of(*o))
    inner = [0 if i in at or mode != "zeros" or taps.low != taps.high else taps.low[i] for i in range(len(taps.kernel))]
    geometry = _Conv(region, layout, weight, taps, at, inner, groups)
    if mode == "zeros":
        y = geometry.overlapped(x, bounds, bias, wanted) if region.overlap else None
        y = geometry.joined(x, bounds, bias, wanted) if y is None else y
    else:
        y = geometry.padded(x, bounds, bias, wanted, mode)
    return set_margin(region.tag(y, layout), _pointwise_margin(x, weight, bias, taps, groups))


def _pointwise_margin(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, taps: Taps, groups: int
) -> Margin | None:
    """A 1-voxel kernel can be applied to the margin as well."""
    margin = margin_of(x)
    if margin is None or any(n != 1 for n in (*taps.kernel, *taps.stride)) or any((*taps.low, *taps.high)):
        return None
    run = _CONV[len(taps.kernel)]
    return Margin(margin.width, {box: run(t, weight, bias, groups=groups) for box, t in margin.pieces.items()})


@dataclass
class _Conv:
    """One convolution's geometry on this rank, and three ways to run it."""

    region: Region
    layout: Layout
    weight: torch.Tensor
    taps: Taps
    at: list[int]  # split axes as spatial axes
    inner: list[int]  # padding of the axes that are not split
    groups: int

    def run(
        self, x: torch.Tensor, bias: torch.Tensor | None, padding: Sequence[int], weight: Any = None
    ) -> torch.Tensor:
        """Ordinary convolution."""
        weight = self.weight if weight is None else weight
        stride, dilation = self.taps.stride, self.taps.dilation
        if _wants_onednn(x, weight):
            return torch.mkldnn_convolution(x, weight, bias, tuple(padding), stride, dilation, self.groups)
        return _CONV[len(stride)](x, weight, bias, stride, tuple(padding), dilation, self.groups)

    def joined(self, x: torch.Tensor, bounds: Any, bias: Any, wanted: Any, periodic: bool = False) -> torch.Tensor:
        """Gather the window first, then convolve once: the strict reference."""
        plan = ints.plan(self.region.comm.rank, bounds, wanted, periodic)
        if not (plan.receives or plan.sends) and plan.window == plan.own:
            return self.run(x, bias, self.inner)
        return self.run(window(self.region.comm, self.region.dims, x, plan), bias, self.inner)

    def padded(self, x: torch.Tensor, bounds: Any, bias: Any, wanted: Any, mode: str) -> torch.Tensor:
        """Other padding modes: circular wraps around the mesh, the others repeat rows at the border."""
        if mode == "circular":
            return self.joined(x, bounds, bias, wanted, periodic=True)
        inside = tuple(tuple(clip_for(mode, w, b[-1]) for w in ws) for ws, b in zip(wanted, bounds, strict=False))
        plan = ints.plan(self.region.comm.rank, bounds, inside)
        wide = window(self.region.comm, self.region.dims, x, plan)
        return self.run(
            border(
                wide, self.region, plan.window, [w[p] for w, p in zip(wanted, self._here, strict=False)], bounds, mode
            ),
            bias,
            self.inner,
        )

    @property
    def _here(self) -> tuple[int, ...]:
        return self.region.mesh.position

    def overlapped(self, x: torch.Tensor, bounds: Any, bias: Any, wanted: Any) -> torch.Tensor | None:
        """Convolve the own rows while halo rows fly, then add what the halo contributes; None if shapes forbid it."""
        grown = tuple(
            tuple((min(w[0], o[0]), max(w[1], o[1])) for w, o in zip(ws, itertools.pairwise(b), strict=False))
            for ws, b in zip(wanted, bounds, strict=False)
        )
        plan = ints.plan(self.region.comm.rank, bounds, grown)
        if not self._fits(plan, x) or _spoils_weight_gradient(x, self.weight):
            return None
        padding = list(self.inner)
        for i in self.at:
            padding[i] = self.taps.low[i]
        if not (plan.receives or plan.sends):
            return self.run(x, bias, padding)
        strips, sizes = strip_boxes(plan), [b[-1] for b in bounds]
        if not strips:
            return None
        margin = _from_margin(x, self.region, plan)
        if margin is not None:
            y = self.run(x, bias, padding)
            return self._add_rim(y, plan, strips, margin, padding, sizes)
        flight = Flight(self.region.comm, self.region.dims, plan)
        interior, token = start(flight, x)
        y = self.run(interior, bias, padding)
        return self._add_rim(y, plan, strips, finish(flight, token), padding, sizes)

    def _fits(self, plan: ints.Plan, x: torch.Tensor) -> bool:
        """Whether symmetric zero padding of the own rows gives exactly this rank's output rows."""
        for i, dim, (own, _), (low, _), n in zip(
            self.at, self.region.dims, plan.own, plan.window, self.region.shape(self.layout), strict=False
        ):
            k, s, d, pad = self.taps.kernel[i], self.taps.stride[i], self.taps.dilation[i], self.taps.low[i]
            if own - low != pad or ints.conv_size(x.shape[dim], k, s, pad, pad, d) != n:
                return False
        return True

    def _add_rim(
        self, y: torch.Tensor, plan: Any, boxes: Any, strips: Any, padding: list[int], sizes: Any
    ) -> torch.Tensor:
        thin: list[torch.Tensor] = []
        places: list[tuple[int, int]] = []
        for number, ((axis, upper, _), strip) in enumerate(zip(boxes, strips, strict=False)):
            beyond = plan.own[axis][1] == sizes[axis] if upper else plan.own[axis][0] == 0
            if beyond and (thin or number < len(boxes) - 1):
                continue  # zeros; but one strip must be used, or backward would not answer the neighbours
            part, first = self._thin(strip, axis, upper, plan, padding, y.shape[self.region.dims[axis]])
            thin.append(part)
            places.append((self.region.dims[axis], first))
        return _AddThin.apply(y, places, *thin)

    def _thin(
        self, strip: torch.Tensor, axis: int, upper: bool, plan: Any, padding: list[int], rows: int
    ) -> tuple[torch.Tensor, int]:
        """Contribution of one strip, and the output row where it starts."""
        i, dim = self.at[axis], self.region.dims[axis]
        k, s, d, p = self.taps.kernel[i], self.taps.stride[i], self.taps.dilation[i], self.taps.low[i]
        n, weight = plan.own[axis][1] - plan.own[axis][0], self.weight
        first = max(-(-(n + p - d * (k - 1)) // s), 0) if upper else 0
        last = rows if upper else min(-(-p // s), rows)
        before = n + p - first * s if upper else 0  # rows of the kernel's reach that lie in the own part
        if last - first == 1:  # one output row: only the taps that look into the strip
            t_low = max(-(-before // d), 0)
            t_high = k if upper else -(-p // d)
            strip = strip.narrow(dim, t_low * d - before, (t_high - t_low - 1) * d + 1)
            weight = weight.narrow(dim, t_low, t_high - t_low)
        else:
            length = (last - first - 1) * s + d * (k - 1) + 1
            strip = pad_axis(strip, dim, before, 0)
            strip = pad_axis(strip, dim, 0, max(length - strip.shape[dim], 0)).narrow(dim, 0, length)
        pads = list(padding)
        for earlier in range(axis + 1):
            pads[self.at[earlier]] = 0
        return self.run(strip, None, pads, weight), first


def _wants_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """On the CPU torch takes a slow path when all but the last axis are small, as they are in thin parts."""
    if x.device.type != "cpu" or x.dtype is not torch.float32 or x.dim() < 4:
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and weight[0, 0].numel() > 1


def _spoils_weight_gradient(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Two padded rows on the first spatial axis: oneDNN 3.13 returns garbage (bfloat16, CPUs with AVX512-BF16)."""
    learns = torch.is_grad_enabled() and weight.requires_grad
    return learns and x.device.type == "cpu" and x.dtype is torch.bfloat16 and x.shape[2] == 2


def _from_margin(x: torch.Tensor, region: Region, plan: ints.Plan) -> Any:
    """Strips cut from the margin that came with the tensor, or None if it is too thin."""
    margin = margin_of(x)
    if margin is None or (x.requires_grad and torch.is_grad_enabled()):
        return None
    rows = [margin.rows(piece.source, region.dims) for piece in plan.receives]
    if any(r is None for r in rows):
        return None
    return assemble(x.shape, region.dims, plan, [r for r in rows if r is not None], x)

"""The table of layers that know their place in the volume; what is not here is refused by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from monai_memeff.halo import conv as convs
from monai_memeff.halo import norm as norms
from monai_memeff.halo import pool as pools
from monai_memeff.halo.conv import Taps
from monai_memeff.halo.region import Margin, NotPartitionable, Region, margin_of, region_of, set_margin
from monai_memeff.halo.resize import resize_part
from monai_memeff.halo.transposed import transposed


def _tuple(value: Any, n: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * n


def _run(module: nn.Module, x: torch.Tensor, sharded: Callable[[Region], torch.Tensor]) -> torch.Tensor:
    """Run a layer on a part of the volume, or as it is on a tensor that every rank holds."""
    region = region_of(module)
    with region.within(module.__dict__["halo_name"]):
        layout = region.layout(x)
        if layout.replicated:
            return region.tag(type(module).halo_original.forward(module, x), layout)
        return sharded(region)


def _local(module: nn.Module, x: torch.Tensor, apply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Run a layer that treats every voxel alone; the margin goes through it as well."""
    region = region_of(module)
    with region.within(module.__dict__["halo_name"]):
        layout, margin = region.layout(x), margin_of(x)
        y = region.tag(apply(x), layout)
        return set_margin(y, margin and Margin(margin.width, {b: apply(t) for b, t in margin.pieces.items()}))


class _Conv:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        n = len(self.kernel_size)
        if isinstance(self.padding, str):
            total = [
                d * (k - 1) if self.padding == "same" else 0
                for k, d in zip(self.kernel_size, self.dilation, strict=False)
            ]
            low, high = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        else:
            low = high = _tuple(self.padding, n)
        taps = Taps(self.kernel_size, self.stride, low, high, self.dilation)
        return _run(self, x, lambda r: convs.conv(r, x, self.weight, self.bias, taps, self.groups, self.padding_mode))


class _Transposed:
    def forward(self: Any, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        if output_size is not None:
            raise region_of(self).fail("output_size is not supported on a part of a volume; use output_padding.")
        taps = Taps(self.kernel_size, self.stride, self.padding, self.padding, self.dilation)
        return _run(self, x, lambda r: transposed(r, x, self.weight, self.bias, taps, self.output_padding, self.groups))


def _pool_taps(module: Any, region: Region) -> Taps:
    n = region.spatial_dims
    stride = module.kernel_size if module.stride is None else module.stride
    padding = _tuple(module.padding, n)
    return Taps(
        _tuple(module.kernel_size, n), _tuple(stride, n), padding, padding, _tuple(getattr(module, "dilation", 1), n)
    )


class _MaxPool:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.return_indices:
            raise region_of(self).fail("return_indices would count from the start of each part; it is not supported.")
        return _run(self, x, lambda r: pools.max_pool(r, x, _pool_taps(self, r), self.ceil_mode))


class _AvgPool:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        divisor = getattr(self, "divisor_override", None)
        return _run(
            self,
            x,
            lambda r: pools.average_pool(r, x, _pool_taps(self, r), self.ceil_mode, self.count_include_pad, divisor),
        )


class _AdaptiveAvg:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return _run(self, x, lambda r: pools.adaptive_pool(r, x, _tuple(self.output_size, r.spatial_dims), False))


class _AdaptiveMax:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.return_indices:
            raise region_of(self).fail("return_indices is not supported on a part of a volume.")
        return _run(self, x, lambda r: pools.adaptive_pool(r, x, _tuple(self.output_size, r.spatial_dims), True))


def _track(module: Any, mean: torch.Tensor, variance: torch.Tensor, total: torch.Tensor, factor: float) -> None:
    """Move running statistics towards those of the whole volume, as torch does."""
    with torch.no_grad():
        unbiased = variance * (total / (total - 1)).to(variance.dtype)
        module.running_mean.lerp_(mean.to(module.running_mean.dtype), factor)
        module.running_var.lerp_(unbiased.to(module.running_var.dtype), factor)


class _InstanceNorm:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.track_running_stats and not self.training:
            return _local(self, x, super().forward)  # type: ignore[misc]

        def sharded(region: Region) -> torch.Tensor:
            y, (mean, variance, total) = norms.instance_norm(region, x, self.weight, self.bias, self.eps)
            if self.track_running_stats:
                shape = (x.shape[0], -1)
                _track(self, mean.view(shape).mean(0), variance.view(shape).mean(0), total, self.momentum or 0.0)
            return y

        return _run(self, x, sharded)


class _BatchNorm:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.running_mean is not None and not self.training:
            return _local(self, x, super().forward)  # type: ignore[misc]

        def sharded(region: Region) -> torch.Tensor:
            y, stats = norms.batch_norm(region, x, self.weight, self.bias, self.eps)
            if self.track_running_stats:
                self.num_batches_tracked.add_(1)
                factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                _track(self, *stats, factor)
            return y

        return _run(self, x, sharded)


class _GroupNorm:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return _run(self, x, lambda r: norms.group_norm(r, x, self.num_groups, self.weight, self.bias, self.eps))


class _Upsample:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        def sharded(region: Region) -> torch.Tensor:
            n = region.spatial_dims
            size = None if self.size is None else _tuple(self.size, n)
            scale = None if self.scale_factor is None else _tuple(self.scale_factor, n)
            fixed = not self.recompute_scale_factor
            return resize_part(region, x, size, scale, self.mode, bool(self.align_corners), fixed)

        return _run(self, x, sharded)


def shared_mask(region: Region, x: torch.Tensor, p: float, name: str, channels_only: bool) -> torch.Tensor:
    """A dropout mask (already scaled) that depends on the step and the layer, so that recomputation repeats it.

    Channel masks are the same on all ranks; voxel masks differ from rank to rank even if all ranks have one seed.
    """
    rank = 0 if channels_only else region.comm.rank + 1
    text = f"{region.seen.seed}/{region.mesh.data_rank}/{name}/{rank}"
    generator = torch.Generator(device=x.device)
    generator.manual_seed(zlib.crc32(text.encode()) | (zlib.crc32(text[::-1].encode()) << 31))
    shape = (*x.shape[:2], *[1] * (x.dim() - 2)) if channels_only else tuple(x.shape)
    keep = torch.rand(shape, generator=generator, device=x.device) >= p
    return keep.to(x.dtype) * (1.0 / (1.0 - p) if p < 1 else 0.0)


class _Dropout:
    _channels = False

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return _local(self, x, super().forward)  # type: ignore[misc]
        region = region_of(self)
        with region.within(self.halo_name):
            layout = region.layout(x)
            mask = shared_mask(region, x, self.p, self.halo_name, self._channels or layout.replicated)
            return region.tag(x * mask, layout)


class _ChannelDropout(_Dropout):
    _channels = True


class _Linear:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        region = region_of(self)
        if not region.layout(x).replicated:
            raise region.fail("a linear layer on a tensor that is spread over the ranks; pool it globally first.")
        return _run(self, x, lambda r: x)


def _names(prefix: str) -> list[type[nn.Module]]:
    return [getattr(nn, f"{prefix}{n}d") for n in (1, 2, 3)]


_FAMILIES: list[tuple[type, list[type[nn.Module]]]] = [
    (_Conv, _names("Conv")),
    (_Transposed, _names("ConvTranspose")),
    (_MaxPool, _names("MaxPool")),
    (_AvgPool, _names("AvgPool")),
    (_AdaptiveAvg, _names("AdaptiveAvgPool")),
    (_AdaptiveMax, _names("AdaptiveMaxPool")),
    (_InstanceNorm, _names("InstanceNorm")),
    (_BatchNorm, _names("BatchNorm")),
    (_GroupNorm, [nn.GroupNorm]),
    (_Upsample, [nn.Upsample]),
    (_Dropout, [nn.Dropout]),
    (_ChannelDropout, _names("Dropout")),
    (_Linear, [nn.Linear]),
]

# What stands in for what: layer of torch -> the same layer on one part of a volume.
TABLE: dict[type[nn.Module], type[nn.Module]] = {
    old: type(
        f"Partitioned{old.__name__}",
        (new, old),
        {"__module__": __name__, "__doc__": f"{old.__name__} on one part of a volume.", "halo_original": old},
    )
    for new, family in _FAMILIES
    for old in family
}
globals().update({new.__name__: new for new in TABLE.values()})

# Layers that treat every voxel alone: they stay as they are.
POINTWISE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
        nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
        nn.Threshold, nn.Softmax, nn.LogSoftmax,
    }
)  # fmt: skip

# Containers of torch whose forward only calls their children.
CONTAINERS: frozenset[type[nn.Module]] = frozenset({nn.Sequential, nn.ModuleList, nn.ModuleDict})


def refuse(name: str, module: nn.Module) -> NotPartitionable:
    """The error for a layer that is not in the table."""
    return NotPartitionable(
        f"Layer '{name}' ({type(module).__name__}) is not in the table of layers that are exact on a part of a volume "
        f"(monai_memeff.halo.layers.TABLE), so the network is left as it was."
    )

"""Norms that have an answer where a channel holds one single value, which has no variance."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Mixin: one value per channel is normalized with the running statistics, which stay, or to zero without any."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, ...)."""
        if input.numel() != input.shape[1] or not (self.training or self.running_mean is None):
            return super().forward(input)
        if self.running_mean is None or self.running_var is None:
            return _affine(input - input, self)
        mean, var = (_per_channel(part, input) for part in (self.running_mean, self.running_var))
        return _affine((input - mean) * (var + self.eps).rsqrt(), self)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` that takes one value per channel in training."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` that takes one value per channel in training."""


class InstanceNorm3d(nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` whose normalized value is zero where an item has one voxel."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W, D)."""
        if math.prod(input.shape[2:]) != 1 or not (self.training or self.running_mean is None):
            return super().forward(input)
        return _affine(input - input, self)


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` whose normalized value is zero where a group has one value."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, ...)."""
        if self.num_channels // self.num_groups * math.prod(input.shape[2:]) != 1:
            return super().forward(input)
        return _affine(input - input, self)


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.InstanceNorm3d: InstanceNorm3d,
    nn.GroupNorm: GroupNorm,
}


def accept_single_values(network: Network) -> Network:
    """Let the norms inside a network accept single values, in place; results for other inputs and keys stay.

    Torch raises there. So small volumes, whose coarsest level is one voxel, can be computed, and trained on.
    """
    for module in network.modules():
        module.__class__ = TWINS.get(type(module), type(module))
    return network


def _affine(normalized: Tensor, norm: nn.Module) -> Tensor:
    weight, bias = norm.weight, norm.bias
    if weight is not None:
        normalized = normalized * _per_channel(weight, normalized)
    return normalized if bias is None else normalized + _per_channel(bias, normalized)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2)).to(like.dtype)

"""Convolution of few rows with many weights: these are read as torch stores them, and the rows are turned instead.

At the coarsest levels of a network a volume has a handful of voxels, and its layers have most of the weights; bringing
those into the order of the kernel's offsets would cost more than the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from monai_memeff.sparse.backends.native.product import accumulator
from monai_memeff.sparse.kernel_map import KernelMap

SHARE = 2
"""Rows times this number may be as many as the output channels."""


def applies(weight: Tensor, kernel_map: KernelMap) -> bool:
    """Whether the weights are many and lie as in ``torch.nn.Conv3d``, and the map is one that gathers."""
    gathers = kernel_map.table is not None and not kernel_map.scatters and not kernel_map.flipped
    few = gathers and SHARE * kernel_map.num_out <= weight.shape[2]
    return few and weight.device.type == "cpu" and weight.permute(2, 1, 0).is_contiguous()


def multiply(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """(num_in, in_channels) -> (num_out, out_channels)."""
    return functional.linear(_gathered(features, kernel_map), weight.permute(2, 1, 0).flatten(1), bias)


def both_gradients(features: Tensor, grad: Tensor, weight: Tensor, kernel_map: KernelMap) -> tuple[Tensor, Tensor]:
    """The gradients of the features, and of the weights in the :func:`accumulator` dtype; ``kernel_map`` is forward."""
    offsets, channels, out_channels = weight.shape
    dtype = accumulator(features.dtype)
    grad_weight = (grad.t() @ _gathered(features, kernel_map)).to(dtype).view(out_channels, channels, offsets)
    parts = (grad @ weight.permute(2, 1, 0).flatten(1)).view(-1, channels, offsets).transpose(1, 2)
    rows = kernel_map.neighbour_rows().t().flatten().long()
    total = torch.zeros(kernel_map.num_in + 1, channels, dtype=dtype, device=features.device)
    total = total.index_add(0, rows, parts.reshape(-1, channels).to(dtype))  # the last row takes what is absent
    return total[:-1].to(features.dtype), grad_weight.permute(2, 1, 0)


def _gathered(features: Tensor, kernel_map: KernelMap) -> Tensor:
    """(num_out, in_channels * num_offsets), offsets fastest as in torch's weights."""
    assert kernel_map.table is not None
    windows = kernel_map.table.windows(features).index_select(0, kernel_map.table.entries.flatten())
    by_offset = windows.view(kernel_map.num_out, kernel_map.num_offsets, features.shape[1])
    return by_offset.transpose(1, 2).flatten(1)

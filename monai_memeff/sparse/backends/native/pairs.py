"""Convolution by pairs, offset by offset: for maps in which most output rows meet few of the offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_memeff.sparse.backends.native.product import accumulator, row_blocks
from monai_memeff.sparse.core.kernel_map import KernelMap


def multiply(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """(num_in, in_channels) -> (num_out, out_channels)."""
    shape = (kernel_map.num_out, weight.shape[2])
    total = torch.zeros(shape, dtype=accumulator(features.dtype), device=features.device)
    if bias is not None:
        total += bias
    for offset, (in_rows, out_rows) in enumerate(kernel_map.each_pair()):
        for rows in row_blocks(in_rows.numel(), features.shape[1], features.device):
            product = features.index_select(0, in_rows[rows]) @ weight[offset]
            total.index_add_(0, out_rows[rows], product.to(total.dtype))
    return total.to(features.dtype)


def weight_gradient(features: Tensor, grad: Tensor, kernel_map: KernelMap, result: Tensor) -> None:
    """Add the gradient of the weights to ``result`` (num_offsets, in_channels, out_channels)."""
    for offset, (in_rows, out_rows) in enumerate(kernel_map.each_pair()):
        for rows in row_blocks(in_rows.numel(), features.shape[1], features.device):
            result[offset] += features.index_select(0, in_rows[rows]).t() @ grad.index_select(0, out_rows[rows])


def both_gradients(features: Tensor, grad: Tensor, weight: Tensor, transposed: KernelMap) -> tuple[Tensor, Tensor]:
    """The gradients of the features, and of the weights in the :func:`accumulator` dtype."""
    grad_weight = torch.zeros(weight.shape, dtype=accumulator(weight.dtype), device=weight.device)
    total = torch.zeros(features.shape, dtype=grad_weight.dtype, device=features.device)
    for offset, (out_rows, in_rows) in enumerate(transposed.each_pair()):
        for rows in row_blocks(in_rows.numel(), max(weight.shape[1:]), features.device):
            gathered = grad.index_select(0, out_rows[rows])
            product = gathered @ weight[offset].t()
            total.index_add_(0, in_rows[rows], product.to(total.dtype))
            grad_weight[offset] += features.index_select(0, in_rows[rows]).t() @ gathered
    return total.to(features.dtype), grad_weight

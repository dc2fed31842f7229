"""Convolution by scattering: every input row writes its products to their places, each of which belongs to it alone."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_memeff.sparse.backends.native.product import accumulator, add_product, row_blocks
from monai_memeff.sparse.core.kernel_map import KernelMap


def multiply(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """(num_in, in_channels) -> (num_out, out_channels)."""
    entries = _entries(kernel_map)
    out_channels = weight.shape[2]
    out = features.new_zeros(kernel_map.num_out + 1, out_channels)  # the last row takes what has no place
    side_by_side = weight.transpose(0, 1).flatten(1)
    if bias is not None:
        out += bias
    for rows in row_blocks(len(entries), side_by_side.shape[1], features.device):
        products = (features[rows] @ side_by_side).view(-1, out_channels)
        if bias is not None:
            products += bias
        out.index_copy_(0, entries[rows].flatten().long(), products)
    return out[:-1]


def weight_gradient(features: Tensor, grad: Tensor, kernel_map: KernelMap, result: Tensor) -> None:
    """Add the gradient of the weights to ``result`` (num_offsets, in_channels, out_channels)."""
    entries = _entries(kernel_map)
    padded = torch.cat((grad, grad.new_zeros(1, grad.shape[1])))
    total = result.new_zeros(features.shape[1], entries.shape[1] * grad.shape[1])
    for rows in row_blocks(len(entries), total.shape[1], features.device):
        gathered = padded.index_select(0, entries[rows].flatten()).view(-1, total.shape[1])
        add_product(total, features[rows].t(), gathered, len(gathered))
    result += total.view(features.shape[1], *result.shape[::2]).transpose(0, 1)


def both_gradients(features: Tensor, grad: Tensor, weight: Tensor, transposed: KernelMap) -> tuple[Tensor, Tensor]:
    """The gradients of the features, scattered, and of the weights in the :func:`accumulator` dtype."""
    entries = _entries(transposed)
    grad_weight = torch.zeros(weight.shape, dtype=accumulator(weight.dtype), device=weight.device)
    offsets, channels, out_channels = weight.shape
    padded = torch.cat((features, features.new_zeros(1, channels)))
    grad_features = torch.zeros_like(padded)
    side_by_side = weight.flatten(0, 1).t().contiguous()
    total = grad_weight.view(offsets * channels, out_channels)
    for rows in row_blocks(len(entries), offsets * channels, features.device):
        places = entries[rows].flatten()
        gathered = padded.index_select(0, places).view(-1, offsets * channels)
        add_product(total, gathered.t(), grad[rows], len(gathered))
        del gathered
        grad_features.index_copy_(0, places.long(), (grad[rows] @ side_by_side).view(-1, channels))
    return grad_features[:-1], grad_weight


def _entries(kernel_map: KernelMap) -> Tensor:
    """(num_in, num_offsets) output rows; ``num_out`` where there is none."""
    assert kernel_map.table is not None
    return kernel_map.table.entries

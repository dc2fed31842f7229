"""Convolution of few rows with many weights: these are read as torch stores them, and the rows are turned instead.

At the coarsest levels of a network a volume has a handful of voxels, and its layers have most of the weights; bringing
those into the order of the kernel's offsets would cost more than the convolution. Torch's weights are a matrix with a
row for every channel of the coarser side and, for the finer one, channels times offsets: a convolution goes through it
from fine to coarse, a transposed one from coarse to fine, and gradients the other way.
"""

from __future__ import annotations

from torch import Tensor

from monai_memeff.sparse.backends.native.product import accumulator, padded, product, rounded_rows
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry, KernelMap

MOST_ROWS = 2
"""Rows of the coarser side for each of its channels: weights are turned twice in a training step, rows once."""


def applies(weight: Tensor, geometry: ConvolutionGeometry) -> bool:
    """Whether the weights (num_offsets, in_channels, out_channels) are many, and lie as in torch's layers."""
    coarse = geometry.inputs if geometry.transposed else geometry.outputs
    channels = weight.shape[1 if geometry.transposed else 2]
    few = 0 < len(coarse) <= MOST_ROWS * channels
    return few and weight.device.type == "cpu" and _torch_order(weight, geometry).is_contiguous()


def multiply(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
    """(num_in, in_channels) -> (num_out, out_channels)."""
    matrix, down, work = _torch_order(weight, geometry).flatten(1), geometry.down, weight.numel()
    rows = rounded_rows(down.num_out, work, features)
    if not geometry.transposed:
        return product(_gathered(features, down, rows), matrix.t(), bias, rows, work)[: down.num_out]
    result = _spread(product(padded(features, rows), matrix, None, rows, work)[: down.num_out], down)
    return result if bias is None else result + bias


def both_gradients(
    features: Tensor, grad: Tensor, weight: Tensor, geometry: ConvolutionGeometry
) -> tuple[Tensor, Tensor]:
    """The gradients of the features, and of the weights in the :func:`accumulator` dtype."""
    order, down = _torch_order(weight, geometry), geometry.down
    matrix, work = order.flatten(1), weight.numel()
    rows = rounded_rows(down.num_out, work, features)
    fine, coarse = (grad, features) if geometry.transposed else (features, grad)
    gathered, coarse = _gathered(fine, down, rows), padded(coarse, rows)
    if geometry.transposed:
        grad_features = product(gathered, matrix.t(), None, rows, work)[: down.num_out]
    else:
        grad_features = _spread(product(coarse, matrix, None, rows, work)[: down.num_out], down)
    grad_weight = product(coarse.t(), gathered, None, rows, work).to(accumulator(features.dtype)).view_as(order)
    return grad_features, grad_weight.permute((2, 0, 1) if geometry.transposed else (2, 1, 0))


def _torch_order(weight: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """(coarse channels, fine channels, num_offsets)."""
    return weight.permute((1, 2, 0) if geometry.transposed else (2, 1, 0))


def _gathered(fine: Tensor, down: KernelMap, rows: int) -> Tensor:
    """What the coarse voxels read: (fine rows, C) -> (rows, C * num_offsets), offsets fastest, zeros at the end."""
    assert down.table is not None
    entries = padded(down.table.entries, rows, down.table.absent)
    windows = down.table.windows(fine).index_select(0, entries.view(-1))
    return windows.view(rows, down.num_offsets, -1).transpose(1, 2).flatten(1)


def _spread(coarse: Tensor, down: KernelMap) -> Tensor:
    """Its adjoint, summed at the fine voxels: (coarse rows, C * num_offsets) -> (fine rows, C)."""
    assert down.table is not None
    parts = coarse.view(down.num_out, -1, down.num_offsets).transpose(1, 2).flatten(0, 1)
    return down.table.summed(parts.to(accumulator(coarse.dtype)), down.num_in).to(coarse.dtype)

"""Convolution of few rows with many weights: these are read as torch stores them, and the rows are turned instead.

At the coarsest levels of a network a volume has a handful of voxels, and its layers have most of the weights; bringing
those into the order of the kernel's offsets would cost more than the convolution. Torch's weights are a matrix with a
row for every channel of the coarser side and, for the finer one, channels times offsets: a convolution goes through it
from fine to coarse, a transposed one from coarse to fine, and gradients the other way.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from monai_memeff.sparse.backends.native.product import accumulator
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry, KernelMap


def applies(weight: Tensor, geometry: ConvolutionGeometry) -> bool:
    """Whether the weights (num_offsets, in_channels, out_channels) are many, and lie as in torch's layers."""
    coarse = geometry.inputs if geometry.transposed else geometry.outputs
    channels = weight.shape[1 if geometry.transposed else 2]
    few = 0 < len(coarse) <= channels
    return few and weight.device.type == "cpu" and _torch_order(weight, geometry).is_contiguous()


def multiply(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
    """(num_in, in_channels) -> (num_out, out_channels)."""
    matrix, down = _torch_order(weight, geometry).flatten(1), geometry.down
    if not geometry.transposed:
        return functional.linear(_gathered(features, down), matrix, bias)
    result = _spread(features @ matrix, down)
    return result if bias is None else result + bias


def both_gradients(
    features: Tensor, grad: Tensor, weight: Tensor, geometry: ConvolutionGeometry
) -> tuple[Tensor, Tensor]:
    """The gradients of the features, and of the weights in the :func:`accumulator` dtype."""
    order, down = _torch_order(weight, geometry), geometry.down
    matrix = order.flatten(1)
    if geometry.transposed:
        gathered = _gathered(grad, down)
        grad_features, grad_matrix = functional.linear(gathered, matrix), features.t() @ gathered
    else:
        grad_features, grad_matrix = _spread(grad @ matrix, down), grad.t() @ _gathered(features, down)
    grad_weight = grad_matrix.to(accumulator(features.dtype)).view_as(order)
    return grad_features, grad_weight.permute((2, 0, 1) if geometry.transposed else (2, 1, 0))


def _torch_order(weight: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """(coarse channels, fine channels, num_offsets)."""
    return weight.permute((1, 2, 0) if geometry.transposed else (2, 1, 0))


def _gathered(fine: Tensor, down: KernelMap) -> Tensor:
    """What the coarse voxels read: (fine rows, C) -> (coarse rows, C * num_offsets), offsets fastest."""
    assert down.table is not None
    windows = down.table.windows(fine).index_select(0, down.table.entries.flatten())
    return windows.view(down.num_out, down.num_offsets, -1).transpose(1, 2).flatten(1)


def _spread(coarse: Tensor, down: KernelMap) -> Tensor:
    """Its adjoint, summed at the fine voxels: (coarse rows, C * num_offsets) -> (fine rows, C)."""
    dtype = accumulator(coarse.dtype)
    parts = coarse.view(down.num_out, -1, down.num_offsets).permute(2, 0, 1).flatten(0, 1).to(dtype)
    total = parts.new_zeros(down.num_in + 1, parts.shape[1])
    total = total.index_add(0, down.neighbor_rows().flatten(), parts)  # the last row takes what is absent
    return total[:-1].to(coarse.dtype)

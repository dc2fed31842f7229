"""The plain PyTorch engine, on any device: blocks of rows, gathered, multiplied and accumulated.

A block of output rows is finished while it is in cache: its input rows are gathered through the neighbor table, a few
lines of the kernel at a time, into one matrix and multiplied by those lines' weights. Transposed convolutions whose
kernel is no larger than the stride multiply a block by all weights and write every product to its one place. Neither
adds to one place from two, so results do not depend on the order in which threads run. Other transposed convolutions go
offset by offset through pairs of rows. Layers with few coarse rows for each coarse channel turn rows, not weights.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from monai_memeff.sparse.backends.native import gather, pairs, scatter, small_batch
from monai_memeff.sparse.backends.native.product import accumulator
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry, KernelMap


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot be used on a device, or None: it always can."""
    return None


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
    """Sparse convolution, differentiable in features, weight and bias.

    Args:
        features: (num_in, in_channels).
        weight: (num_offsets, in_channels, out_channels).
        bias: (out_channels) or None.
        geometry: the voxel sets and the kernel's shape.

    Returns:
        (num_out, out_channels), in the dtype of ``features``.
    """
    return _Convolution.apply(features, weight, bias, geometry)


class _Convolution(torch.autograd.Function):
    """Forward and its adjoint; the input gradient is the same computation on the transposed map."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: ConvolutionGeometry,
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.geometry = geometry
        if len(features) and small_batch.applies(weight, geometry):
            return small_batch.multiply(features, weight, bias, geometry)
        return multiply(features, weight, bias, geometry.kernel_map)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        needs_features, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_features: Tensor | None = None
        grad_weight: Tensor | None = None
        if needs_features and needs_weight and len(features) and small_batch.applies(weight, ctx.geometry):
            grad_features, grad_weight = small_batch.both_gradients(features, grad, weight, ctx.geometry)
        elif needs_features and needs_weight:
            back = ctx.geometry.kernel_map.transposed
            grad_features, grad_weight = both_gradients(features, grad, weight, back)
        elif needs_features:
            grad_features = multiply(grad, weight.transpose(1, 2), None, ctx.geometry.kernel_map.transposed)
        elif needs_weight:
            grad_weight = weight_gradient(features, grad, ctx.geometry.kernel_map)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_features, grad_weight, grad.sum(0) if needs_bias else None, None


def multiply(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """The convolution itself, without autograd; arguments as in :func:`convolve`, but with the map planned."""
    shape = (kernel_map.num_out, weight.shape[2])
    if len(features) == 0 or kernel_map.num_out == 0:
        return features.new_zeros(shape) if bias is None else bias.expand(shape).contiguous()
    weight = weight.contiguous().flip(0) if kernel_map.flipped else weight  # flipping permuted weights is slow
    return _layout(kernel_map).multiply(features, weight, bias, kernel_map)


def weight_gradient(features: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
    """Gradient of the weights, accumulated in float32 at least.

    Args:
        features: (num_in, in_channels).
        grad: (num_out, out_channels), gradient of the output.
        kernel_map: the planned geometry.

    Returns:
        (num_offsets, in_channels, out_channels).
    """
    shape = (kernel_map.num_offsets, features.shape[1], grad.shape[1])
    result = torch.zeros(shape, dtype=accumulator(features.dtype), device=features.device)
    if len(features) and len(grad):
        _layout(kernel_map).weight_gradient(features, grad, kernel_map, result)
    return result.flip(0) if kernel_map.flipped else result


def both_gradients(features: Tensor, grad: Tensor, weight: Tensor, transposed: KernelMap) -> tuple[Tensor, Tensor]:
    """Gradients of features and weights in one pass: rows of ``grad`` that are gathered once serve both.

    Args:
        features: (num_in, in_channels).
        grad: (num_out, out_channels), gradient of the output.
        weight: (num_offsets, in_channels, out_channels).
        transposed: the map from the outputs back to the inputs.

    Returns:
        (num_in, in_channels), and (num_offsets, in_channels, out_channels) accumulated in float32 at least.
    """
    if len(features) == 0 or len(grad) == 0:
        return torch.zeros_like(features), torch.zeros(
            weight.shape, dtype=accumulator(weight.dtype), device=weight.device
        )
    return _layout(transposed).both_gradients(features, grad, weight, transposed)


def _layout(kernel_map: KernelMap) -> ModuleType:
    if kernel_map.table is None:
        return pairs
    return scatter if kernel_map.scatters else gather

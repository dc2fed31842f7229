"""Our engine for CUDA, written in Triton: masked implicit GEMM, each output row written once, no atomics.

A program owns a tile of output rows and channels, walks through the kernel offsets that occur in it, gathers input rows
through the neighbor table straight into the matrix product and stores a float32 sum once. The gradient of the features
is the same kernel on the transposed map; that of the weights is one product per offset, split over rows and added up in
a fixed order. Results are the same at every run with the same block sizes (see ``tuning``). float32 is IEEE float32
unless torch allows TF32; bfloat16 and float16 accumulate in float32. Native computes float64, and the half precisions
on GPUs before Ampere: Triton uses no tensor cores there and runs out of registers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monai_memeff.sparse.backends import native
from monai_memeff.sparse.backends.triton import kernels, launch
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry, KernelMap

HALVES = (torch.bfloat16, torch.float16)

AMPERE = (8, 0)
"""The least compute capability for which Triton multiplies on tensor cores."""


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot be used on a device, or None."""
    if device.type == "cuda" or kernels.INTERPRETED:
        return None
    return (
        f"Triton compiles for GPUs, not for {device.type} tensors; with TRITON_INTERPRET=1, set before Triton is first "
        "imported, its interpreter runs there, for tests only"
    )


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
    """Sparse convolution, differentiable in features, weight and bias, twice if need be.

    Arguments and result as in :func:`monai_memeff.sparse.backends.native.convolve`.
    """
    if not _computes(features.dtype, features.device) or len(geometry.inputs) == 0 or len(geometry.outputs) == 0:
        return native.convolve(features, weight, bias, geometry)
    return _Convolution.apply(features, weight, bias, geometry.kernel_map)


def _computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this engine has a kernel for a dtype that is worth running on a device."""
    if dtype in HALVES:
        return device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE
    return dtype == torch.float32


class _Convolution(torch.autograd.Function):
    """Forward and its adjoint; the input gradient is the same computation on the transposed map."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.kernel_map = kernel_map
        return launch.multiply(features, weight, bias, kernel_map)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        needs_features, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_features = grad_weight = None
        if needs_features:
            grad_features = _Convolution.apply(grad, weight.transpose(1, 2), None, ctx.kernel_map.transposed)
        if needs_weight:
            grad_weight = _WeightGradient.apply(features, grad, ctx.kernel_map).to(weight.dtype)
        return grad_features, grad_weight, grad.sum(0) if needs_bias else None, None


class _WeightGradient(torch.autograd.Function):
    """(num_in, in_channels) and (num_out, out_channels) -> (num_offsets, in_channels, out_channels) float32."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(features, grad)
        ctx.kernel_map = kernel_map
        return launch.weight_gradient(features, grad, kernel_map)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
        features, grad = ctx.saved_tensors
        weight = second.to(features.dtype)
        return (
            _Convolution.apply(grad, weight.transpose(1, 2), None, ctx.kernel_map.transposed),
            _Convolution.apply(features, weight, None, ctx.kernel_map),
            None,
        )

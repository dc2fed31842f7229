"""ocnn 2.3 as an engine: its Triton kernels on CUDA, its products in torch on a CPU, both on our tables of neighbors.

Its octrees need cubes of 2^n voxels, kernels of at most 3^3 and stride 2; its products read a table only: the input row
of every output row and kernel point. Ours has the same content, so every map can be expressed, the gradient of the
features is a product on the transposed map, and no octree is built. The kernels' own backward pass, which takes every
map for symmetric, is not used. Its tuner writes what it found to ~/.ocnn-triton.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monai_memeff.sparse.backends import native
from monai_memeff.sparse.backends.implicit_gemm import ABSENT, MAX_BYTES, log_once
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry, KernelMap

OLDEST = (2, 3)
"""The first version that is known to have the functions used here."""

TUNED_ROWS = 2**13
"""Fewer rows take the smallest block: timing all, times all splits, would take minutes for each pair of channels."""

BUFFER = 2**20
"""Gathered numbers at a time on a CPU; the library's own choice is 800 MB of them."""

AMPERE = (8, 0)
"""The least compute capability with tensor cores for bfloat16."""


def library(part: str) -> ModuleType:
    """A module of the library, ``ocnn.nn.`` and its name.

    Raises:
        ImportError: it is not installed, or Triton, which its kernels need, is not.
    """
    return importlib.import_module(f"ocnn.nn.{part}")


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot be used on a device, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"ocnn has no kernels for {device.type} tensors"
    try:
        import ocnn

        library("kernels" if device.type == "cuda" else "octree_conv")
    except ImportError as error:
        return f"{type(error).__name__}: {error}; pip install 'ocnn>=2.3'"
    if tuple(map(int, ocnn.__version__.split(".")[:2])) < OLDEST:
        return f"ocnn {ocnn.__version__} is older than 2.3; pip install --upgrade ocnn"
    return None


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
    """Sparse convolution, differentiable once in features, weight and bias; sums are in float32 at least.

    Arguments and result as in :func:`monai_memeff.sparse.backends.native.convolve`, which computes what ocnn has no
    kernel for: on CUDA float64, bfloat16 before Ampere and tensors beyond 32-bit addresses.
    """
    if len(geometry.inputs) == 0 or len(geometry.outputs) == 0:
        return native.convolve(features, weight, bias, geometry)
    reason = declined(features, weight, geometry) if features.is_cuda else None
    if reason is not None:
        log_once(f"sparse engine ocnn leaves some convolutions to native: {reason}.")
        return native.convolve(features, weight, bias, geometry)
    result: Tensor = _Convolution.apply(features, weight, geometry.kernel_map, features.is_cuda)
    return result if bias is None else result + bias


def declined(features: Tensor, weight: Tensor, geometry: ConvolutionGeometry) -> str | None:
    """Why a convolution cannot be given to the kernels, or None."""
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernels for {features.dtype}"
    if features.dtype == torch.bfloat16 and torch.cuda.get_device_capability(features.device) < AMPERE:
        return "bfloat16 needs compute capability 8.0"
    rows, channels = max(len(geometry.inputs), len(geometry.outputs)), max(weight.shape[1:])
    if rows * max(channels, geometry.shape.volume) > MAX_BYTES:
        return f"{rows} rows of {channels} channels are beyond 32-bit addresses"
    return None


class _Convolution(torch.autograd.Function):
    """Forward and its adjoint, which is the same product on the transposed map."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, kernel_map: KernelMap, kernels: bool) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.kernel_map, ctx.kernels = kernel_map, kernels
        product = _multiply_by_kernels if kernels else _multiply_by_torch
        return product(features.contiguous(), weight, table_of(kernel_map))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        grad, there = grad.contiguous(), table_of(ctx.kernel_map)
        of_features = of_weight = None
        if ctx.needs_input_grad[0]:
            product = _multiply_by_kernels if ctx.kernels else _multiply_by_torch
            of_features = product(grad, weight.transpose(1, 2), table_of(ctx.kernel_map.transposed))
        if ctx.needs_input_grad[1]:
            adjoint = _weight_gradient_by_kernels if ctx.kernels else _weight_gradient_by_torch
            of_weight = adjoint(features.contiguous(), grad, there).to(weight.dtype)
        return of_features, of_weight, None, None


_tables: WeakKeyDictionary[KernelMap, Tensor] = WeakKeyDictionary()


@torch.inference_mode(False)  # kept for training too
def table_of(kernel_map: KernelMap) -> Tensor:
    """(num_out, num_offsets) int32 input rows, -1 where there is none, made once for a map."""
    if kernel_map not in _tables:
        rows = kernel_map.neighbor_rows()
        _tables[kernel_map] = rows.masked_fill(rows == kernel_map.num_in, ABSENT).t().contiguous()
    return _tables[kernel_map]


def _multiply_by_kernels(features: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """(num_in, in) and (num_offsets, in, out) -> (num_out, out)."""
    ours, few = weight.permute(2, 0, 1).contiguous(), len(table) < TUNED_ROWS
    with torch.cuda.device_of(features), _precision():
        if few:
            with _smallest_block("conv_fwd_implicit_gemm", "conv_fwd_implicit_gemm_kernel"):
                result: Tensor = library("kernels").conv_fwd_implicit_gemm(features, ours, None, table)
        else:
            result = library("kernels").conv_fwd_implicit_gemm_splitk(features, ours, None, table)
    return result


def _weight_gradient_by_kernels(features: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """(num_in, in) and (num_out, out) -> (num_offsets, in, out)."""
    # Of the weights the kernels read the dtype and the shape.
    like = grad.new_empty(grad.shape[1], table.shape[1], features.shape[1])
    arguments = (grad, features, like, None, table, (False, True, False))
    with torch.cuda.device_of(features), _precision():
        if len(table) < TUNED_ROWS:
            with _smallest_block("conv_bwd_implicit_gemm", "conv_bwd_weight_implicit_gemm_kernel"):
                found: Tensor = library("kernels").conv_bwd_implicit_gemm(*arguments)[1]
        else:
            found = library("kernels").conv_bwd_implicit_gemm_splitk(*arguments)[1]
    return found.permute(1, 2, 0)


@contextmanager
def _precision() -> Iterator[None]:
    """TF32 where torch allows it; the library's own default is TF32 everywhere."""
    config: Any = library("kernels.config")
    before, config.allow_tf32 = config.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        config.allow_tf32 = before


@contextmanager
def _smallest_block(module: str, name: str) -> Iterator[None]:
    """One candidate for a kernel's blocks, which is then neither timed nor remembered."""
    kernel = getattr(library(f"kernels.{module}"), name)
    before = kernel.configs
    kernel.configs = sorted(before, key=lambda choice: math.prod(choice.kwargs.values()))[:1]
    try:
        yield
    finally:
        kernel.configs = before


@dataclass
class _Level:
    """What the products in torch look up in an octree: the rows of two levels, and the neighbors between them."""

    nnum_nempty: dict[int, int]
    table: Tensor

    def get_neigh(self, *_: object) -> Tensor:
        """The table, whatever kernel is named."""
        return self.table


def _product_in_torch(table: Tensor, num_in: int, in_channels: int, out_channels: int) -> Any:
    """The library's convolution from level 1 to level 0, with a buffer of at most half as many parts as it has rows."""
    offsets = table.shape[1]
    rows = max(BUFFER // (offsets * in_channels), 2 * math.isqrt(len(table)) + 1)
    kind = library("octree_conv")._OctreeConv
    found = kind(in_channels, out_channels, [offsets, 1, 1], 2, True, rows * offsets * in_channels)
    found.setup(_Level({1: num_in, 0: len(table)}, table), 1)
    return found


def _multiply_by_torch(features: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """As :func:`_multiply_by_kernels`, half precisions in float32."""
    exact = torch.promote_types(features.dtype, torch.float32)
    given = features.to(exact)
    product = _product_in_torch(table, len(features), *weight.shape[1:])
    result: Tensor = product.forward_gemm(product.check_and_init(given), given, weight.to(exact).contiguous())
    return result.to(features.dtype)


def _weight_gradient_by_torch(features: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """As :func:`_weight_gradient_by_kernels`, in float32 at least."""
    exact = torch.promote_types(features.dtype, torch.float32)
    product = _product_in_torch(table, len(features), features.shape[1], grad.shape[1])
    zeros = grad.new_zeros(table.shape[1], features.shape[1], grad.shape[1], dtype=exact)
    result: Tensor = product.weight_gemm(zeros, features.to(exact), grad.to(exact))
    return result

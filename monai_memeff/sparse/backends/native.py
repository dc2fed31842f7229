"""The plain PyTorch engine, on any device: blocks of output rows, gathered, multiplied and accumulated.

A block of output rows is finished while it is in cache: for every plane of kernel offsets its input rows are gathered
through the neighbour table into one (rows, offsets * channels) matrix and multiplied by that plane's weights. Nothing
is scattered, so the result does not depend on the order in which threads run. Maps with few pairs per offset
(transposed convolutions) go offset by offset through pairs instead: gather, multiply, index_add.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from monai_memeff.sparse.kernel_map import KernelMap

BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}
"""Elements of one gathered block: at most eight megabytes in float32 stay in a shared cache."""

MIN_BLOCK_ROWS = 1024

PLANNED_ROWS = 256
"""Rows of the smallest block that is worth a plan of oneDNN's."""


def unavailable() -> str | None:
    """Why this engine cannot be used, or None: it always can."""
    return None


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """Sparse convolution, differentiable in features, weight and bias.

    Args:
        features: (num_in, in_channels).
        weight: (num_offsets, in_channels, out_channels).
        bias: (out_channels) or None.
        kernel_map: the planned geometry.

    Returns:
        (num_out, out_channels), in the dtype of ``features``.
    """
    return _Convolution.apply(features, weight, bias, kernel_map)


class _Convolution(torch.autograd.Function):
    """Forward and its adjoint; the input gradient is the same computation on the transposed map."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel_map: KernelMap,
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.kernel_map = kernel_map
        return gather_multiply(features, weight, bias, kernel_map)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        needs_features, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_features: Tensor | None = None
        grad_weight: Tensor | None = None
        if needs_features and needs_weight:
            grad_features, grad_weight = both_gradients(features, grad, weight, ctx.kernel_map.transposed)
        elif needs_features:
            grad_features = gather_multiply(grad, weight.transpose(1, 2), None, ctx.kernel_map.transposed)
        elif needs_weight:
            grad_weight = weight_gradient(features, grad, ctx.kernel_map)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_features, grad_weight, grad.sum(0) if needs_bias else None, None


def gather_multiply(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """The convolution itself, without autograd; arguments as in :func:`convolve`."""
    out = _initial_output(bias, kernel_map.num_out, weight.shape[2], features)
    if kernel_map.num_pairs == 0:
        return out
    if kernel_map.flipped:
        weight = weight.flip(0)
    if kernel_map.table is not None:
        _by_table(features, weight, kernel_map.table, out)
    else:
        _by_pairs(features, weight, kernel_map, out)
    return out


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
    result = torch.zeros(shape, dtype=_accumulator(features.dtype), device=features.device)
    if kernel_map.num_pairs == 0:
        return result
    if kernel_map.table is not None:
        _weight_by_table(features, grad, kernel_map.table, result)
    else:
        for offset, (in_rows, out_rows) in enumerate(kernel_map.each_pair()):
            for rows in _blocks(in_rows.numel(), features.shape[1], features.device):
                result[offset] += features[in_rows[rows]].t() @ grad[out_rows[rows]]
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
    grad_features = torch.zeros_like(features)
    grad_weight = torch.zeros(weight.shape, dtype=_accumulator(features.dtype), device=features.device)
    if transposed.num_pairs == 0:
        return grad_features, grad_weight
    if transposed.flipped:
        weight = weight.flip(0)
    if transposed.table is not None:
        _both_by_table(features, grad, weight, transposed.table, grad_features, grad_weight)
    else:
        _both_by_pairs(features, grad, weight, transposed, grad_features, grad_weight)
    return grad_features, grad_weight.flip(0) if transposed.flipped else grad_weight


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _add_product(total: Tensor, a: Tensor, b: Tensor, rows: int) -> None:
    """Add ``a @ b`` of a block of rows in place.

    In float32 on the CPU oneDNN multiplies, which uses 512-bit vectors on every processor that has them; torch's own
    BLAS does so on Intel's only. oneDNN plans every new shape, so it gets blocks of 2^n rows and torch the last few.
    """
    planned = rows >= PLANNED_ROWS and rows & (rows - 1) == 0
    if planned and a.dtype == torch.float32 and a.device.type == "cpu" and _has_onednn():
        total += torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    else:
        total.addmm_(a, b)


@functools.cache
def _has_onednn() -> bool:
    """Whether torch has oneDNN's matrix product, and it gives what torch's own gives."""
    a, b = torch.randn(24, 18), torch.randn(18, 16)
    try:
        return torch.allclose(torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""), a @ b, atol=1e-4)
    except (AttributeError, RuntimeError):
        return False


def _initial_output(bias: Tensor | None, rows: int, channels: int, like: Tensor) -> Tensor:
    if bias is None:
        return like.new_zeros(rows, channels)
    return bias.to(like.dtype).expand(rows, channels).contiguous()


def _blocks(rows: int, row_elements: int, device: torch.device) -> list[slice]:
    """Row ranges whose gathered blocks fit the budget: of 2^n rows each, then halves of that, and the last few."""
    most = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // max(row_elements, 1))
    size, start, blocks = 1 << (most.bit_length() - 1), 0, []
    while start < rows:
        while size > max(rows - start, PLANNED_ROWS):
            size //= 2
        blocks.append(slice(start, min(start + size, rows)))
        start += size
    return blocks


def _with_absent_row(features: Tensor) -> Tensor:
    """Append the row of zeros that stands for absent neighbours."""
    return torch.cat((features, features.new_zeros(1, features.shape[1])))


def _by_table(features: Tensor, weight: Tensor, table: Tensor, out: Tensor) -> None:
    planes, num_out, per_plane = table.shape
    padded = _with_absent_row(features)
    plane_weights = weight.reshape(planes, per_plane * features.shape[1], -1)
    exact = _accumulator(out.dtype) == out.dtype
    for rows in _blocks(num_out, per_plane * features.shape[1], features.device):
        block = out[rows] if exact else out[rows].float()
        for plane in range(planes):
            gathered = padded.index_select(0, table[plane, rows].flatten()).view(block.shape[0], -1)
            if exact:
                _add_product(block, gathered, plane_weights[plane], len(block))
            else:
                block += gathered @ plane_weights[plane]
            del gathered  # before the next one is made: one block is alive at a time, always the same memory
        if not exact:
            out[rows] = block


def _weight_by_table(features: Tensor, grad: Tensor, table: Tensor, result: Tensor) -> None:
    planes, num_out, per_plane = table.shape
    padded = _with_absent_row(features)
    plane_results = result.view(planes, per_plane * features.shape[1], -1)
    for rows in _blocks(num_out, per_plane * features.shape[1], features.device):
        for plane in range(planes):
            gathered = padded.index_select(0, table[plane, rows].flatten()).view(-1, per_plane * features.shape[1])
            plane_results[plane] += gathered.t() @ grad[rows]
            del gathered


def _by_pairs(features: Tensor, weight: Tensor, kernel_map: KernelMap, out: Tensor) -> None:
    exact = _accumulator(out.dtype) == out.dtype
    total = out if exact else out.float()
    for offset, (in_rows, out_rows) in enumerate(kernel_map.each_pair()):
        for rows in _blocks(in_rows.numel(), features.shape[1], features.device):
            product = features.index_select(0, in_rows[rows]) @ weight[offset]
            total.index_add_(0, out_rows[rows], product.to(total.dtype))
    if not exact:
        out.copy_(total)


def _both_by_table(
    features: Tensor, grad: Tensor, weight: Tensor, table: Tensor, grad_features: Tensor, grad_weight: Tensor
) -> None:
    planes, num_in, per_plane = table.shape
    channels, out_channels = weight.shape[1:]
    padded = _with_absent_row(grad)
    plane_weights = weight.transpose(1, 2).reshape(planes, per_plane * out_channels, channels)
    plane_results = grad_weight.new_zeros(planes, channels, per_plane * out_channels)
    exact = grad_weight.dtype == grad_features.dtype
    for rows in _blocks(num_in, per_plane * out_channels, features.device):
        block = grad_features[rows] if exact else grad_features[rows].float()
        turned = features[rows].t()
        for plane in range(planes):
            gathered = padded.index_select(0, table[plane, rows].flatten()).view(block.shape[0], -1)
            if exact:
                _add_product(block, gathered, plane_weights[plane], len(block))
                _add_product(plane_results[plane], turned, gathered, len(block))
            else:
                block += gathered @ plane_weights[plane]
                plane_results[plane] += turned @ gathered
            del gathered
        if not exact:
            grad_features[rows] = block
    by_offset = plane_results.view(planes, channels, per_plane, out_channels).transpose(1, 2)
    grad_weight.copy_(by_offset.reshape(grad_weight.shape))


def _both_by_pairs(
    features: Tensor, grad: Tensor, weight: Tensor, transposed: KernelMap, grad_features: Tensor, grad_weight: Tensor
) -> None:
    exact = grad_weight.dtype == grad_features.dtype
    total = grad_features if exact else grad_features.float()
    for offset, (out_rows, in_rows) in enumerate(transposed.each_pair()):
        for rows in _blocks(in_rows.numel(), max(weight.shape[1:]), features.device):
            gathered = grad.index_select(0, out_rows[rows])
            product = gathered @ weight[offset].t()
            total.index_add_(0, in_rows[rows], product.to(total.dtype))
            grad_weight[offset] += features.index_select(0, in_rows[rows]).t() @ gathered
    if not exact:
        grad_features.copy_(total)

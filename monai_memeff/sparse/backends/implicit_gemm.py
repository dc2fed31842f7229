"""What spconv and its Triton port share: our kernel maps as the tables their implicit GEMM reads, and the call itself.

Only the product is delegated. Their own tables have the same content as ours (the input row of every output row and
offset, the offsets of a row as a bit mask, rows sorted by it), so they are made from our kernel map: rows keep their
order, every map can be expressed, and coordinates never pass through their 32-bit keys.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from monai_memeff.sparse.backends import native
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry, KernelMap
from monai_memeff.sparse.core.offset_masks import offset_masks

MAX_OFFSETS = 32
"""Offsets of a kernel that fit one word of the bit mask."""

MAX_BYTES = 2**31 - 1
"""Of a tensor that 32-bit addresses reach; spconv raises beyond it."""

DTYPES = (torch.float32, torch.float16)

ABSENT = -1
INDEX_BYTES = 4

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """One direction of a kernel map as the libraries read it.

    Attributes:
        pairs: (num_offsets, rows) int32 rows on the other side, -1 where there is none.
        mask: (rows, 1) int32, bit t set where offset t is present; sorted.
        order: (rows,) int32, the row that every entry of ``mask`` belongs to.
    """

    pairs: Tensor
    mask: Tensor
    order: Tensor


@torch.inference_mode(False)  # kept for training too, where tensors of inference mode cannot be saved for backward
def rows_of(kernel_map: KernelMap) -> Rows:
    """The tables of a map, for its output rows."""
    rows = kernel_map.neighbor_rows()
    pairs = rows.masked_fill(rows == kernel_map.num_in, ABSENT)
    mask, order = offset_masks(rows, kernel_map.num_in, MAX_OFFSETS).sort(stable=True)
    mask = torch.where(mask < 2**31, mask, mask - 2**32)  # the same 32 bits, as a signed number
    return Rows(pairs, mask.to(torch.int32)[:, None], order.to(torch.int32))


_tables: WeakKeyDictionary[KernelMap, Rows] = WeakKeyDictionary()


def _remembered(kernel_map: KernelMap) -> Rows:
    if kernel_map not in _tables:
        _tables[kernel_map] = rows_of(kernel_map)
    return _tables[kernel_map]


def declined(features: Tensor, weight: Tensor, geometry: ConvolutionGeometry) -> str | None:
    """Why a convolution cannot be given to these libraries, or None."""
    if features.dtype not in DTYPES:
        return f"no kernels for {features.dtype}"
    if geometry.shape.volume > MAX_OFFSETS:
        return f"kernels of more than {MAX_OFFSETS} points, got {geometry.shape.kernel_size}"
    rows, channels = max(len(geometry.inputs), len(geometry.outputs)), max(weight.shape[1:])
    if rows * max(channels * features.element_size(), geometry.shape.volume * INDEX_BYTES) > MAX_BYTES:
        return f"{rows} rows of {channels} channels are beyond 32-bit addresses"
    return None


def convolve(
    name: str,
    functional: ModuleType,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvolutionGeometry,
) -> Tensor:
    """Sparse convolution by a library, or by native where the library has no kernel; the latter is logged once.

    Args:
        name: Name of the engine, for the message.
        functional: the library's module with ``SparseImplicitGemmFunction``.
        features: (N, C), as the remaining arguments and the result, see
            :func:`monai_memeff.sparse.backends.native.convolve`.
        weight: see there.
        bias: see there.
        geometry: see there.
    """
    if len(geometry.inputs) == 0 or len(geometry.outputs) == 0:
        return native.convolve(features, weight, bias, geometry)
    reason = declined(features, weight, geometry)
    if reason is not None:
        log_once(f"sparse engine {name} leaves some convolutions to native: {reason}.")
        return native.convolve(features, weight, bias, geometry)
    with torch.cuda.device_of(features):
        arguments = _arguments(functional, features, weight, geometry)
        result = functional.SparseImplicitGemmFunction.apply(*arguments)
    return result if bias is None else result + bias


def _arguments(
    functional: ModuleType, features: Tensor, weight: Tensor, geometry: ConvolutionGeometry
) -> tuple[Any, ...]:
    """What both libraries take, in their order."""
    kernel_map = geometry.kernel_map  # looked up once: maps that no voxel set keeps are planned at every call
    there = _remembered(kernel_map)
    in_training = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    back = _remembered(kernel_map.transposed) if in_training else there
    return (
        features.contiguous(),
        output_channels_first(weight, geometry),
        there.pairs,
        back.pairs,
        [there.mask],
        [back.mask],
        [there.order],
        [back.order],
        len(geometry.outputs),
        [np.array([0xFFFFFFFF], dtype=np.uint32)],  # one group of offsets: all of them
        in_training,
        False,  # not submanifold: two tables, and results that start as zeros, for rows without any neighbor
        functional.CUDAKernelTimer(False),
        True if features.dtype == torch.float16 else None,  # sums in float32; spconv 2.3 does not listen
    )


def output_channels_first(weight: Tensor, geometry: ConvolutionGeometry) -> Tensor:
    """(num_offsets, in, out) -> (out, k, k, k, in), the layout of both libraries; offsets keep their order."""
    return weight.unflatten(0, geometry.shape.kernel_size).movedim(-1, 0).contiguous()


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Warn, but of one thing only once in a process."""
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)

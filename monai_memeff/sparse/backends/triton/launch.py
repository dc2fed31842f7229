"""Launching the kernels: shapes, precision and block sizes from tensors and kernel maps."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from monai_memeff.sparse.backends.triton import kernels, tuning
from monai_memeff.sparse.backends.triton.rows import RowPlan, row_plan
from monai_memeff.sparse.backends.triton.tuning import Blocks
from monai_memeff.sparse.core.kernel_map import KernelMap

INT32_ELEMENTS = 2**31 - 1
"""Tensors with more elements than this are addressed with 64-bit numbers."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs per multiprocessor to which the rows of the weight gradient are split."""

INTERPRETED_SPLITS = 3
"""Splits of the weight gradient in the interpreter, so that tests see their sum."""


def multiply(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """The convolution, without autograd.

    Args:
        features: (num_in, in_channels) float32, bfloat16 or float16, at least one row.
        weight: (num_offsets, in_channels, out_channels), same dtype. Those of our layers are views whose neighboring
            channels are far apart in memory; threads would load them one by one, so they are copied.
        bias: (out_channels) or None.
        kernel_map: the planned geometry, with at least one output row.

    Returns:
        (num_out, out_channels), in the dtype of ``features``.
    """
    features, weight, plan = features.contiguous(), weight.contiguous(), row_plan(kernel_map)
    out = features.new_empty(kernel_map.num_out, weight.shape[2])
    _, channels, columns = weight.shape
    key = _key("multiply", features, kernel_map, channels, columns)
    with _on(features.device):
        blocks = tuning.choose(
            key,
            tuning.candidates(channels, columns, features.dtype),
            lambda choice: _multiply(features, weight, bias, plan, kernel_map.flipped, out, choice),
            worth_timing=_is_worth_timing(features, kernel_map),
        )
        _multiply(features, weight, bias, plan, kernel_map.flipped, out, blocks)
    return out


def _multiply(
    features: Tensor, weight: Tensor, bias: Tensor | None, plan: RowPlan, flipped: bool, out: Tensor, blocks: Blocks
) -> None:
    offsets, channels, columns = weight.shape
    tiles = plan.tiles(blocks.rows)
    offsets_of_tile, offsets_in_tile = tiles.of_tile
    kernels.gather_multiply[(len(tiles), math.ceil(columns / blocks.columns))](
        features,
        weight,
        features if bias is None else bias.contiguous(),
        out,
        plan.table,
        plan.order,
        offsets_of_tile,
        offsets_in_tile,
        plan.num_in,
        len(plan.order),
        offsets,
        IN_CHANNELS=channels,
        OUT_CHANNELS=columns,
        FLIPPED=flipped,
        HAS_BIAS=bias is not None,
        **_common(blocks, features.dtype, features, weight, out, plan.table),
    )


def weight_gradient(features: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
    """Gradient of the weights.

    Args:
        features: (num_in, in_channels).
        grad: (num_out, out_channels), gradient of the output, same dtype.
        kernel_map: the planned geometry.

    Returns:
        (num_offsets, in_channels, out_channels) float32.
    """
    features, grad, plan = features.contiguous(), grad.contiguous(), row_plan(kernel_map)
    channels, columns = features.shape[1], grad.shape[1]
    key = _key("weight_gradient", features, kernel_map, channels, columns)
    with _on(features.device):
        blocks = tuning.choose(
            key,
            tuning.candidates(channels, columns, features.dtype),
            lambda choice: _weight_gradient(features, grad, plan, choice),
            worth_timing=_is_worth_timing(features, kernel_map),
        )
        total = _weight_gradient(features, grad, plan, blocks)
    return total.flip(0) if kernel_map.flipped else total


def _weight_gradient(features: Tensor, grad: Tensor, plan: RowPlan, blocks: Blocks) -> Tensor:
    offsets, channels, columns = len(plan.table), features.shape[1], grad.shape[1]
    tiles = plan.tiles(blocks.rows)
    depths, widths = math.ceil(channels / blocks.depth), math.ceil(columns / blocks.columns)
    tiles_of_offset, tiles_in_offset = tiles.of_offset
    splits = _splits(offsets * depths * widths, len(tiles), features.device)
    parts = torch.empty((splits, offsets, channels, columns), dtype=torch.float32, device=features.device)
    kernels.weight_gradient[(offsets * splits, depths, widths)](
        features,
        grad,
        parts,
        plan.table,
        plan.order,
        tiles_of_offset,
        tiles_in_offset,
        plan.num_in,
        len(plan.order),
        offsets,
        len(tiles),
        splits,
        IN_CHANNELS=channels,
        OUT_CHANNELS=columns,
        **_common(blocks, features.dtype, features, grad, parts, plan.table),
    )
    return parts[0] if splits == 1 else parts.sum(0)


def _splits(programs: int, num_tiles: int, device: torch.device) -> int:
    """Into how many runs the tiles of an offset are split; depends on shapes and the device only."""
    if device.type != "cuda":
        return min(INTERPRETED_SPLITS, num_tiles)
    wanted = PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(num_tiles, math.ceil(wanted / programs)))


def _common(blocks: Blocks, dtype: torch.dtype, *addressed: Tensor) -> dict[str, int | str | bool]:
    """What both kernels take by name."""
    return {
        "PRECISION": _precision(dtype),
        "WIDE": max(tensor.numel() for tensor in addressed) > INT32_ELEMENTS,
        "WIDEN": kernels.INTERPRETED and dtype == torch.bfloat16,  # it would multiply the bits as integers
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "DEPTH": blocks.depth,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "enable_fp_fusion": True,  # said because Triton's default will change
    }


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products: IEEE, or TF32 where torch's own matrix products may use it."""
    if dtype != torch.float32:
        return "ieee"
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch >= 2.9
    return "tf32" if (chosen == "tf32" if chosen is not None else torch.backends.cuda.matmul.allow_tf32) else "ieee"


def _key(kernel: str, features: Tensor, kernel_map: KernelMap, channels: int, columns: int) -> str:
    """What block sizes depend on; rows are counted in powers of eight.

    Channels are exact, and Triton's version is there: both decide how much shared memory a choice takes.
    """
    rows = 8 ** round(math.log2(max(kernel_map.num_out, 1)) / 3)
    dtype = str(features.dtype).removeprefix("torch.")
    parts = (channels, columns, kernel_map.num_offsets, rows)
    device = tuning.device_name(features.device)
    return "|".join((kernel, device, kernels.VERSION, dtype, _precision(features.dtype), *map(str, parts)))


def _is_worth_timing(features: Tensor, kernel_map: KernelMap) -> bool:
    """Only on a GPU, on problems that are large enough to tell candidates apart, and outside of a graph capture."""
    if features.device.type != "cuda" or kernels.INTERPRETED:
        return False
    return kernel_map.num_out >= tuning.MIN_ROWS and not torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

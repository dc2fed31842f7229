"""Average pooling of volumes that every device has in every precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def average_pool(
    volume: Tensor, window: int | Sequence[int], step: int | Sequence[int] | None = None, ceil_mode: bool = False
) -> Tensor:
    """Averages over windows (B, C, h, w, d), of what a window at the border has only.

    The kernels of a GPU add half precision up in float32 and round once. The CPU has none for it, and does the same
    here.

    Args:
        volume: (B, C, H, W, D).
        window: voxels along each axis.
        step: between two windows; by default as large as a window.
        ceil_mode: windows that are cut off by the border count too.
    """
    wide = volume.device.type == "cpu" and volume.dtype in (torch.bfloat16, torch.float16)
    numbers = volume.float() if wide else volume
    pooled = functional.avg_pool3d(numbers, window, step, ceil_mode=ceil_mode, count_include_pad=False)
    return pooled.to(volume.dtype) if wide else pooled

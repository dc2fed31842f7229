"""The convolution kernels that parts are computed with."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _python_dispatch  # read in torch 2.6 to 2.14


class _Dry(threading.local):
    kind: str | None = None


DRY = _Dry()
"""While a thread makes a plan, the type of the device the plan is for: its dry run takes the same path."""

_SLOW = 20480
"""Values of an input without its last dimension up to which torch prefers its slow kernel for a volume."""

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _kind(x: torch.Tensor) -> str:
    """Type of the device that a tensor is on, or will be."""
    return DRY.kind or "meta" if x.device.type == "meta" else x.device.type


def _direct(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN is to be called directly: torch's own choice falls to a slow kernel for thin float32 tiles."""
    if _kind(x) != "cpu" or x.device.type != weight.device.type or x.dtype != torch.float32 or weight.dtype != x.dtype:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return False
    return x.dim() == weight.dim() and weight.dim() in (4, 5) and x.numel() > 0


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """The convolution, by oneDNN for float32 on a CPU without gradients.

    `torch.ops.aten.mkldnn_convolution` is private; its arguments were read in torch 2.6, 2.11 and 2.14. Where it is
    missing torch's own choice is used.
    """
    kernel = getattr(torch.ops.aten, "mkldnn_convolution", None)
    if kernel is not None and torch.backends.mkldnn.enabled and _direct(x, weight):
        x = x.contiguous()
        if x.device.type != "meta":
            result: torch.Tensor = kernel(x, weight, bias, padding, stride, dilation, groups)
            return result
    y = CONV[weight.dim() - 2](x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    _workspace(x, y)
    return y


def _workspace(x: torch.Tensor, y: torch.Tensor) -> None:
    """In a dry run for a GPU, take for a moment what cuDNN takes beside a convolution's input and result.

    Its kernels work on copies of both with the channels last: with H100 and H200, torch 2.11, the workspace was their
    sum. Kernels that want more are passed over where a budget bounds the allocator.
    """
    if x.device.type == "meta" and DRY.kind == "cuda":
        torch.empty(x.numel() + y.numel(), dtype=x.dtype, device=x.device)


def convolve_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    wanted: tuple[bool, bool, bool],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of a convolution by its input, weight and bias, those that are wanted; by oneDNN as `convolve`.

    torch takes oneDNN for an input in oneDNN's layout, whatever its size; read in torch 2.11 and 2.14. The layout is
    made only where torch would otherwise take its slow kernel.
    """
    with torch.no_grad():
        if torch.backends.mkldnn.enabled and x.shape[:4].numel() <= _SLOW and _direct(x, weight):
            gradient, x = gradient.contiguous(), x.to_mkldnn()
        sizes = [weight.shape[0]] if wanted[2] else None
        rest = (False, [0] * len(stride), groups, wanted)
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten.convolution_backward(
            gradient, x, weight, sizes, stride, padding, dilation, *rest
        )
    return found


def transpose(
    function: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    """A transposed convolution; a dry run counts its workspace on a GPU, and its result as torch allocates it on a CPU.

    oneDNN's transposed convolution gives a result whose storage is at least as large as its input (torch 2.14).
    """
    if x.device.type != "meta" or DRY.kind != "cpu":
        result: torch.Tensor = function(x, weight, bias, *rest)
        _workspace(x, result)
        return result
    with _python_dispatch._disable_current_modes():
        shape = function(x, weight, bias, *rest).shape
    count = math.prod(shape)
    return torch.empty(max(count, x.numel()), dtype=x.dtype, device=x.device)[:count].view(shape)

"""spconv 2.3 as an engine: its implicit GEMM on CUDA; refused on the CPU, where it is wrong without saying so.

In float16 it may choose kernels that sum in float16, whatever the settings say. TF32 is its own switch, read when it
chooses a kernel for a pair of channel numbers: ``spconv.constants.SPCONV_ALLOW_TF32 = True`` before the first call.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from monai_memeff.sparse.backends import implicit_gemm
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry


def library() -> ModuleType:
    """The library's differentiable functions.

    Raises:
        ImportError: it is not installed.
    """
    import spconv.pytorch.functional

    return spconv.pytorch.functional


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot be used on a device, or None."""
    if device.type != "cuda":
        return (
            f"spconv is for CUDA tensors only, got {device.type}: on the CPU its results are wrong with two threads, "
            "without an error, and its backward pass raises"
        )
    try:
        library()
    except ImportError as error:
        return f"{type(error).__name__}: {error}; install the wheel for your CUDA, such as spconv-cu126"
    return None


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
    """Sparse convolution in float32 or float16, differentiable once in features, weight and bias.

    Arguments and result as in :func:`monai_memeff.sparse.backends.native.convolve`, which computes what spconv has no
    kernel for: other dtypes, kernels of more than 32 points, tensors of 2 GiB.

    Raises:
        ValueError: the tensors are not on a CUDA device.
    """
    if features.device.type != "cuda":
        raise ValueError(f"{unavailable(features.device)}. Use the engine 'native' there.")
    return implicit_gemm.convolve("spconv", library(), features, weight, bias, geometry)

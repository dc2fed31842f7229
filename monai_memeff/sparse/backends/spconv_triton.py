"""spconv-triton 1.0 as an engine, on CUDA only: spconv's implicit GEMM in Triton, a small wheel for any torch.

The first call for a pair of channel numbers compiles and times some forty candidates. TF32 is its own switch:
``spconv_triton.constants.SPCONV_ALLOW_TF32 = True``.
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
        ImportError: it is not installed, or Triton is not.
    """
    import spconv_triton.pytorch.functional

    return spconv_triton.pytorch.functional


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot be used on a device, or None."""
    if device.type != "cuda":
        return f"spconv-triton is for CUDA tensors only, got {device.type}"
    try:
        library()
    except ImportError as error:
        return f"{type(error).__name__}: {error}; pip install spconv-triton"
    return None


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
    """Sparse convolution in float32 or float16, differentiable once in features, weight and bias.

    Arguments and result as in :func:`monai_memeff.sparse.backends.native.convolve`, which computes what spconv-triton
    has no kernel for: other dtypes, kernels of more than 32 points, tensors of 2 GiB.

    Raises:
        ValueError: the tensors are not on a CUDA device.
    """
    if features.device.type != "cuda":
        raise ValueError(f"{unavailable(features.device)}. Use the engine 'native' there.")
    return implicit_gemm.convolve("spconv_triton", library(), features, weight, bias, geometry)

"""The self-test an engine passes before it is used: three small convolutions, forward and backward, against native."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from monai_memeff.sparse.backends import native
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from monai_memeff.sparse.core.neighbors import KernelShape
from monai_memeff.sparse.core.voxel_set import VoxelSet

SHAPE = (6, 5, 8)
BATCH_SIZE = 2
IN_CHANNELS, OUT_CHANNELS = 8, 16
"""Multiples of eight: some libraries have kernels for nothing else in half precision."""

PARTS = ("output", "gradient of the features", "gradient of the weights", "gradient of the bias")


def self_test_error(engine: ModuleType, device: torch.device) -> str | None:
    """Why an engine's results cannot be trusted on a device, or None if they agree with native's.

    All numbers are small integers, which float32, TF32 and both half precisions hold exactly, so the agreement does not
    depend on the precision that is allowed. No random numbers are drawn from torch's own state.
    """
    if engine is native:
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for kind, geometry in _geometries(device):
                pairs = zip(PARTS, _results(engine, geometry), _results(native, geometry), strict=True)
                for part, ours, reference in pairs:
                    fault = _difference(ours, reference)
                    if fault:
                        return f"in the self-test the {part} of a {kind} convolution {fault}"
    except Exception as error:  # a library may fail in any way of its own
        return f"the self-test ended in {type(error).__name__}: {error}"
    return None


def _geometries(device: torch.device) -> Iterator[tuple[str, ConvolutionGeometry]]:
    cells = BATCH_SIZE * SHAPE[0] * SHAPE[1] * SHAPE[2]
    keys = torch.randperm(cells, generator=_generator())[: cells // 3].sort()[0]
    fine = VoxelSet(keys.to(device), SHAPE, BATCH_SIZE)
    coarse = fine.coarsened((2, 2, 2))
    halving = KernelShape((2, 2, 2), (2, 2, 2))
    yield "submanifold", ConvolutionGeometry(fine, fine, KernelShape((3, 3, 3), padding=(1, 1, 1)))
    yield "strided", ConvolutionGeometry(fine, coarse, halving)
    yield "transposed", ConvolutionGeometry(coarse, fine, halving, transposed=True)


def _results(engine: ModuleType, geometry: ConvolutionGeometry) -> tuple[Tensor, ...]:
    """Output and gradients for the same integers at every call."""
    generator, device = _generator(), geometry.inputs.device
    features, weight, bias, cotangent = (
        torch.randint(-3, 4, shape, generator=generator).to(device, torch.float32).requires_grad_()
        for shape in (
            (len(geometry.inputs), IN_CHANNELS),
            (geometry.shape.volume, IN_CHANNELS, OUT_CHANNELS),
            (OUT_CHANNELS,),
            (len(geometry.outputs), OUT_CHANNELS),
        )
    )
    out = engine.convolve(features, weight, bias, geometry)
    return (out, *torch.autograd.grad(out, (features, weight, bias), cotangent.detach()))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _difference(ours: Tensor, reference: Tensor) -> str:
    if ours.shape != reference.shape or ours.dtype != reference.dtype:
        return f"is {ours.dtype} {tuple(ours.shape)} where native's is {reference.dtype} {tuple(reference.shape)}"
    error = float((ours - reference).detach().abs().max())
    return "" if error < 0.5 else f"differs from native's by {error:g}"  # NaN differs too

"""What every engine must do as native does: geometries of all kinds, a comparison, and the one table of tolerances."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from monai_memeff.sparse.backends import native
from monai_memeff.sparse.core.generate import generate
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from monai_memeff.sparse.core.neighbors import KernelShape
from monai_memeff.sparse.core.voxel_set import VoxelSet
from tests.sparse.reference import Size, triple

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
"""Largest error allowed, as a share of the largest value of the tensor: two steps of the half precisions' mantissas
(10 and 7 bits), and for float32 what sums of 27 * 33 products in another order may differ by."""

PARTS = ("output", "features", "weight", "bias")

SHAPE = (5, 4, 7)


def voxels(occupancy: float, shape: tuple[int, int, int] = SHAPE, batch: int = 2) -> VoxelSet:
    """A random set, without any voxel in the last item where there are three or more."""
    mask = torch.rand(batch, *shape) < occupancy
    if batch > 2:
        mask[-1] = False
    return VoxelSet(mask.flatten().nonzero()[:, 0], shape, batch)


def shape_of(kernel: Size, stride: Size = 1, dilation: Size = 1, padding: Size | None = None) -> KernelShape:
    """A kernel's shape with the default padding of ``SparseConv3d``."""
    sizes, spread = triple(kernel), triple(dilation)
    i, j, k = (d * (n - 1) // 2 for n, d in zip(sizes, spread, strict=True)) if padding is None else triple(padding)
    return KernelShape(sizes, triple(stride), spread, (i, j, k))


def convolution(kernel: Size, stride: Size = 1, dilation: Size = 1, occupancy: float = 0.4) -> ConvolutionGeometry:
    """From a random set to itself, or to the set coarsened from it."""
    shape, fine = shape_of(kernel, stride, dilation), voxels(occupancy, batch=3)
    return ConvolutionGeometry(fine, fine if shape.stride == (1, 1, 1) else fine.coarsened(shape.stride), shape)


def back(kernel: Size, stride: Size = 2, occupancy: float = 0.4) -> ConvolutionGeometry:
    """Transposed, onto the set that the input was coarsened from."""
    there = convolution(kernel, stride, occupancy=occupancy)
    return ConvolutionGeometry(there.outputs, there.inputs, there.shape, transposed=True)


def onto_target(kernel: Size, stride: Size = 2) -> ConvolutionGeometry:
    """Transposed, onto voxels that have nothing to do with the input."""
    shape = shape_of(kernel, stride)
    return ConvolutionGeometry(voxels(0.4).coarsened(shape.stride), voxels(0.5), shape, transposed=True)


def generative(kernel: Size, stride: Size = 2) -> ConvolutionGeometry:
    """Transposed, onto everything that is reached."""
    coarse, shape = voxels(0.3, (2, 3, 2)), shape_of(kernel, stride, padding=0)
    return ConvolutionGeometry(coarse, generate(coarse, shape), shape, transposed=True)


def one_voxel() -> ConvolutionGeometry:
    """A single voxel in a corner."""
    corner = VoxelSet(torch.tensor([SHAPE[2] - 1]), SHAPE, 1)
    return ConvolutionGeometry(corner, corner, shape_of(3))


GEOMETRIES: dict[str, Callable[[], ConvolutionGeometry]] = {
    "3^3": lambda: convolution(3),
    "3^3 on a full grid": lambda: convolution(3, occupancy=1.0),
    "3^3 on one voxel": one_voxel,
    "3^3 on nothing": lambda: convolution(3, occupancy=0.0),
    "3^3 dilated": lambda: convolution(3, dilation=2),
    "4^3": lambda: convolution(4),
    "3x1x2": lambda: convolution((3, 1, 2)),
    "5^3": lambda: convolution(5),
    "2^3 stride 2": lambda: convolution(2, 2),
    "3^3 stride 2": lambda: convolution(3, 2),
    "1^3 stride 2": lambda: convolution(1, 2),
    "3x1x2 stride 1x2x2 dilated": lambda: convolution((3, 1, 2), (1, 2, 2), (1, 3, 2)),
    "2^3 back": lambda: back(2),
    "2^3 back to a full grid": lambda: back(2, occupancy=1.0),
    "3^3 back": lambda: back(3),
    "3^3 transposed": lambda: back(3, 1),
    "2^3 onto a target": lambda: onto_target(2),
    "2^3 generative": lambda: generative(2),
    "4^3 generative": lambda: generative(4),
}


def results(
    engine: ModuleType, geometry: ConvolutionGeometry, tensors: tuple[Tensor, ...], bias: bool = True
) -> dict[str, Tensor]:
    """Output and gradients of an engine."""
    features, weight, offset = (tensor.detach().clone().requires_grad_() for tensor in tensors[:3])
    out = engine.convolve(features, weight, offset if bias else None, geometry)
    leaves = (features, weight, offset) if bias else (features, weight)
    return dict(zip(PARTS, (out.detach(), *torch.autograd.grad(out, leaves, tensors[3])), strict=False))


def random_tensors(
    geometry: ConvolutionGeometry, in_channels: int, out_channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Features, weight, bias and the gradient of the output."""
    shapes = (
        (len(geometry.inputs), in_channels),
        (geometry.shape.volume, in_channels, out_channels),
        (out_channels,),
        (len(geometry.outputs), out_channels),
    )
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def assert_equals_native(
    engine: ModuleType,
    geometry: ConvolutionGeometry,
    channels: tuple[int, int] = (3, 5),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> None:
    """Compare output and gradients with native's on the same numbers, in float32 at least, within the table."""
    tensors = random_tensors(geometry, *channels, dtype)
    exact = tensors if dtype == torch.float64 else tuple(tensor.float() for tensor in tensors)
    reference, ours = results(native, geometry, exact, bias), results(engine, geometry, tensors, bias)
    assert ours.keys() == reference.keys()
    for part, expected in reference.items():
        found = ours[part]
        assert (found.dtype, found.shape) == (dtype, expected.shape), part
        if expected.numel():
            error = float((found.to(expected.dtype) - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
            assert error <= TOLERANCES[dtype], f"{part} is off by {error:.2e} of its largest value"

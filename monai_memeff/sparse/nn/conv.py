"""Sparse 3D convolutions with the parameters of ``torch.nn.Conv3d`` and ``torch.nn.ConvTranspose3d``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from monai_memeff.arguments import check_count, numbers_checked
from monai_memeff.sparse import backends
from monai_memeff.sparse.core.checks import check_refines
from monai_memeff.sparse.core.fused import saved_for_recompute
from monai_memeff.sparse.core.generate import generate
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from monai_memeff.sparse.core.neighbors import KernelShape, Triple
from monai_memeff.sparse.core.tensor import SparseTensor
from monai_memeff.sparse.core.voxel_set import VoxelSet

Size = int | tuple[int, int, int]


class SparseConv3d(nn.Conv3d):
    """Convolution on active voxels.

    With stride 1 the active voxels stay as they are (submanifold convolution, Graham et al. 2018, arXiv 1711.10275);
    with stride s the results stand at floor(c / s) of the active voxels. Values equal ``torch.nn.Conv3d`` with the same
    parameters and ``padding = dilation * (kernel_size - 1) // 2`` on the zero-filled dense volume, read at the active
    output voxels. An even kernel with stride s keeps ceil(extent / s) cells where torch keeps floor: the last cell is
    what torch computes on a volume padded with zeros at its end.

    Args:
        in_channels: features per input voxel.
        out_channels: features per output voxel.
        kernel_size: 1 to 5 in practice, odd or even, one number or one per axis.
        stride: step, one number or one per axis.
        dilation: spacing of the kernel's points.
        bias: whether to learn an additive bias.

    Shape: SparseTensor with (N, in_channels) -> SparseTensor with (M, out_channels); M = N for stride 1.
    ``weight`` is (out_channels, in_channels, k, k, k) and ``bias`` (out_channels), as in torch.

    Raises:
        ValueError: an argument is not a whole number of at least 1, or (in the call) the channels do not fit.
        TypeError: the layer is called with a dense tensor.

    Examples:
        >>> x = SparseTensor(torch.ones(2, 8), torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]]), (32, 32, 16))
        >>> SparseConv3d(8, 4, kernel_size=3)(x).features.shape
        torch.Size([2, 4])
    """

    @numbers_checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        dilation: Size = 1,
        bias: bool = True,
    ) -> None:
        padding = _default_padding(steps(kernel_size), steps(dilation))
        super().__init__(in_channels, out_channels, kernel_size, steps(stride), padding, dilation, bias=bias)

    @torch.compiler.disable  # every number of active voxels would be compiled anew
    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve (see the class)."""
        _check_channels(self, x)
        shape = _shape_of(self)
        outputs = x.voxels if shape.stride == (1, 1, 1) else x.voxels.coarsened(shape.stride)
        weight = self.weight.flatten(2).permute(2, 1, 0)
        return _apply(x, weight, self.bias, ConvolutionGeometry(x.voxels, outputs, shape))


class SparseConvTranspose3d(nn.ConvTranspose3d):
    """Transposed convolution from active voxels onto known finer voxels, or onto all voxels it can reach.

    Values equal ``torch.nn.ConvTranspose3d`` with the same parameters on the zero-filled dense volume, read at the
    output voxels. Voxel c reaches ``stride * c - padding + dilation * t``, t = 0 ... kernel_size - 1.

    Args:
        in_channels: features per input voxel.
        out_channels: features per output voxel.
        kernel_size: one number or one per axis.
        stride: refinement, one number or one per axis.
        dilation: spacing of the kernel's points.
        bias: whether to learn an additive bias.
        generative: create every voxel that is reached, clipped to the volume (Gwak et al. 2020, arXiv 2006.12356),
            instead of using known ones.
        padding: default ``dilation * (kernel_size - 1) // 2``, the transpose of :class:`SparseConv3d`.

    A call takes the coarse features and, if wanted, ``target``: see ``forward``, which names its errors.

    Shape: SparseTensor with (N, in_channels) -> SparseTensor with (M, out_channels).
    ``weight`` is (in_channels, out_channels, k, k, k) and ``bias`` (out_channels), as in torch.

    Examples:
        >>> x = SparseTensor(torch.ones(1, 8), torch.tensor([[0, 1, 2, 3]]), (16, 16, 8), stride=2)
        >>> SparseConvTranspose3d(8, 4, kernel_size=2, stride=2, generative=True)(x).features.shape
        torch.Size([8, 4])
    """

    generative: bool = False

    @numbers_checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 2,
        stride: Size = 2,
        dilation: Size = 1,
        bias: bool = True,
        generative: bool = False,
        padding: Size | None = None,
    ) -> None:
        default = _default_padding(steps(kernel_size), steps(dilation))
        padding = default if padding is None else padding
        super().__init__(in_channels, out_channels, kernel_size, steps(stride), padding, bias=bias, dilation=dilation)
        self.generative = generative

    @torch.compiler.disable  # every number of active voxels would be compiled anew
    def forward(self, x: SparseTensor, target: SparseTensor | None = None) -> SparseTensor:
        """Convolve back to a finer level.

        Args:
            x: coarse features.
            target: Tensor or set whose voxels are computed; default the set from which ``x`` was coarsened. Not for
                generative layers.

        Raises:
            ValueError: no finer voxels are known, they or the target lie on a grid that is not ``stride`` times finer,
                a target is given to a generative layer, or the channels do not fit.
            TypeError: ``x`` is a dense tensor.
        """
        _check_channels(self, x)
        shape = _shape_of(self)
        outputs = self._outputs(x, target, shape)
        weight = self.weight.flatten(2).permute(2, 0, 1)
        return _apply(x, weight, self.bias, ConvolutionGeometry(x.voxels, outputs, shape, transposed=True))

    def _outputs(self, x: SparseTensor, target: SparseTensor | None, shape: KernelShape) -> VoxelSet:
        if self.generative:
            if target is not None:
                raise ValueError("a generative SparseConvTranspose3d creates its own voxels; call it without a target.")
            return self.generated_voxels(x)
        if target is not None:
            check_refines(target.voxels, x.voxels, shape.stride, "the target")
            return target.voxels
        outputs = x.voxels if shape.stride == (1, 1, 1) else x.voxels.finer
        if outputs is None:
            raise ValueError(
                "SparseConvTranspose3d knows no finer voxels: the input was not coarsened from any. "
                "Pass target=..., or use generative=True."
            )
        check_refines(outputs, x.voxels, shape.stride, "the set from which the input was coarsened")
        return outputs

    def generated_voxels(self, x: SparseTensor) -> VoxelSet:
        """The voxels that a generative layer creates for ``x``; they are kept for the call that follows."""
        return generate(x.voxels, _shape_of(self))


def _apply(x: SparseTensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> SparseTensor:
    """Run the engine in use, in autocast's dtype where autocast is on; 1^3 kernels are a plain matrix product."""
    device = x.device.type
    features, casts = x.features, torch.is_autocast_enabled(device)
    if casts:
        features = features.to(torch.get_autocast_dtype(device))
    weight = weight.to(features.dtype)
    bias = None if bias is None else bias.to(features.dtype)
    with torch.autocast(device, enabled=False) if casts else nullcontext(), saved_for_recompute(features, x.recompute):
        if geometry.shape.is_pointwise and geometry.inputs is geometry.outputs:
            result = nn.functional.linear(features, weight[0].t(), bias)
        else:
            result = backends.current(features.device).convolve(features, weight, bias, geometry)
    return SparseTensor.on(geometry.outputs, result)


def _shape_of(layer: nn.Conv3d | nn.ConvTranspose3d) -> KernelShape:
    return _kernel_shape(layer.kernel_size, layer.stride, layer.dilation, layer.padding)


@functools.lru_cache(maxsize=1024)  # every call of every layer needs it
def _kernel_shape(
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    padding: int | str | tuple[int, ...],
) -> KernelShape:
    if isinstance(padding, str):  # "same" or "valid", as torch allows
        padding = _default_padding(_triple(kernel_size), _triple(dilation)) if padding == "same" else 0
    return KernelShape(_triple(kernel_size), _triple(stride), _triple(dilation), _triple(padding))


def _default_padding(kernel_size: Triple, dilation: Triple) -> Triple:
    i, j, k = (d * (size - 1) // 2 for size, d in zip(kernel_size, dilation, strict=True))
    return i, j, k


def _triple(value: int | tuple[int, ...]) -> Triple:
    i, j, k = (value,) * 3 if isinstance(value, int) else value
    return i, j, k


def steps(value: int | tuple[int, ...]) -> Triple:
    """Kernel size, stride or dilation per axis: ValueError unless they are whole numbers of at least 1."""
    i, j, k = values = value if isinstance(value, Sequence) else (value,) * 3
    for number in values:
        check_count("a kernel size, stride or dilation", number)
    return i, j, k


def _check_channels(layer: nn.Conv3d | nn.ConvTranspose3d, x: SparseTensor) -> None:
    if not isinstance(x, SparseTensor):
        raise TypeError(
            f"{type(layer).__name__} takes a SparseTensor, got {type(x).__name__}; use SparseTensor.from_dense."
        )
    if x.features.shape[1] != layer.in_channels:
        raise ValueError(f"{type(layer).__name__} expects {layer.in_channels} channels, got {x.features.shape[1]}.")

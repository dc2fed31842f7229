"""MinkowskiEngine 0.5.4 as an engine: the library of the published skull network, on the devices it was built for."""

from __future__ import annotations

import collections
import collections.abc
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from monai_memeff.sparse.backends import native
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from monai_memeff.sparse.core.neighbors import KernelShape, Triple
from monai_memeff.sparse.core.voxel_set import VoxelSet


@cache
def library() -> ModuleType:
    """Import MinkowskiEngine 0.5.4, which looks for ``Sequence`` and others where Python 3.9 still had them.

    The names are put into ``collections`` for the time of the import only.

    Raises:
        ImportError: it is not installed, or it was built for another version of torch.
    """
    lent = [name for name in collections.abc.__all__ if not hasattr(collections, name)]
    for name in lent:
        setattr(collections, name, getattr(collections.abc, name))
    try:
        import MinkowskiEngine
    finally:
        for name in lent:
            delattr(collections, name)
    return MinkowskiEngine


def unavailable(device: torch.device) -> str | None:
    """Why this engine cannot be used on a device, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"MinkowskiEngine has no kernels for {device.type} tensors"
    try:
        engine = library()
    except ImportError as error:
        return f"{type(error).__name__}: {error}; how to build it: docs/howto/minkowski.md"
    if device.type == "cuda" and not engine.is_cuda_available():
        return "this MinkowskiEngine was built for the CPU only"
    return None


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
    """Sparse convolution, differentiable in features, weight and bias.

    Arguments and result as in :func:`monai_memeff.sparse.backends.native.convolve`. bfloat16 and float16, for which
    MinkowskiEngine has no kernels, are computed in float32; sets without voxels, which it refuses, by native.
    """
    if len(geometry.inputs) == 0 or len(geometry.outputs) == 0:
        return native.convolve(features, weight, bias, geometry)
    exact = features.dtype if features.dtype == torch.float64 else torch.float32
    placed, engine = _placed(geometry), library()
    from MinkowskiEngineBackend._C import ConvolutionMode  # not among the names of the package itself

    if geometry.transposed:
        function, source, goal = engine.MinkowskiConvolutionTransposeFunction, placed.coarse, placed.fine
    else:
        function, source, goal = engine.MinkowskiConvolutionFunction, placed.fine, placed.coarse
    result = function.apply(
        source.to_theirs(features.to(exact)),
        first_axis_fastest(weight.to(exact), geometry.shape.kernel_size),
        placed.kernel,
        ConvolutionMode.DEFAULT,
        source.key,
        goal.key,
        placed.manager,
    )
    result = goal.to_ours(result).to(features.dtype)
    return result if bias is None else result + bias


def first_axis_fastest(weight: Tensor, kernel_size: Triple) -> Tensor:
    """(num_offsets, ...) with the last axis of the kernel fastest -> MinkowskiEngine's order, first axis fastest."""
    return weight.unflatten(0, kernel_size).transpose(0, 2).flatten(0, 2).contiguous()


@dataclass(frozen=True, eq=False)
class _Rows:
    """One voxel set in MinkowskiEngine's hands: its key, and how rows are numbered there if not as here."""

    key: Any
    theirs: Tensor | None
    ours: Tensor | None

    def to_theirs(self, rows: Tensor) -> Tensor:
        return rows if self.theirs is None else rows.index_select(0, self.theirs)

    def to_ours(self, rows: Tensor) -> Tensor:
        return rows if self.ours is None else rows.index_select(0, self.ours)


@dataclass(frozen=True, eq=False)
class _Placed:
    """Both voxel sets of a geometry in one coordinate manager, which keeps the kernel map."""

    manager: Any
    kernel: Any
    fine: _Rows
    coarse: _Rows


def _placed(geometry: ConvolutionGeometry) -> _Placed:
    """Both sets, placed once and kept by the same voxel set that keeps our own kernel map."""
    fine, coarse = (geometry.outputs, geometry.inputs) if geometry.transposed else (geometry.inputs, geometry.outputs)
    if coarse is fine or coarse.finer is fine:
        key = ("minkowski", geometry.shape, coarse is fine)
        return coarse.planned(key, lambda: _place(fine, coarse, geometry.shape))
    return _place(fine, coarse, geometry.shape)


def _place(fine: VoxelSet, coarse: VoxelSet, shape: KernelShape) -> _Placed:
    """Insert both sets.

    MinkowskiEngine centers odd kernels on the output voxel and lets even ones start there. Coarse voxels are therefore
    put where that first or middle point is: ``stride * c - padding``, and for odd sizes half the reach further.
    """
    engine = library()
    on_gpu = fine.device.type == "cuda"
    kind = engine.CoordinateMapType.CUDA if on_gpu else engine.CoordinateMapType.CPU
    manager = engine.CoordinateManager(D=3, coordinate_map_type=kind)
    kernel = engine.KernelGenerator(shape.kernel_size, shape.stride, shape.dilation, dimension=3)
    shift = [
        dilation * (size // 2) * (size % 2) - padding
        for size, dilation, padding in zip(shape.kernel_size, shape.dilation, shape.padding, strict=True)
    ]
    placed = _insert(manager, fine.coordinates, (1, 1, 1), "")
    if coarse is fine and not any(shift):
        return _Placed(manager, kernel, placed, placed)
    coordinates = coarse.coordinates * _row((1, *shape.stride), fine) + _row((0, *shift), fine)
    return _Placed(manager, kernel, placed, _insert(manager, coordinates, shape.stride, "coarse"))


def _insert(manager: Any, coordinates: Tensor, stride: Triple, name: str) -> _Rows:
    key, (theirs, ours) = manager.insert_and_map(coordinates.int().contiguous(), list(stride), name)
    if torch.equal(theirs.long(), torch.arange(len(coordinates), device=theirs.device)):
        return _Rows(key, None, None)
    return _Rows(key, theirs.long(), ours.long())


def _row(values: tuple[int, ...], voxel_set: VoxelSet) -> Tensor:
    return torch.tensor(values, device=voxel_set.device)

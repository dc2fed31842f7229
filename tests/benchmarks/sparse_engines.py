"""The same submanifold convolution in three engines, with one interface for timing and comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monai_memeff.sparse import SparseConv3d, SparseTensor

SEMI_AXES = (0.42, 0.36, 0.41)
"""Of the ellipsoid, as fractions of the extent."""


def ellipsoid_shell(extent: int, thickness: float) -> Tensor:
    """(extent, extent, extent) boolean: voxel centers between an ellipsoid and one ``thickness`` voxels inside it."""
    axis = torch.arange(extent, dtype=torch.float32) - (extent - 1) / 2
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    outer = torch.tensor(SEMI_AXES).view(3, 1, 1, 1) * extent
    return ((grid / outer).square().sum(0) <= 1) & ((grid / (outer - thickness)).square().sum(0) > 1)


class Engine:
    """One convolution, ready to run; subclasses set ``run``, ``leaves`` and how results compare."""

    leaves: tuple[Tensor, ...]
    cotangent: Tensor

    def run(self) -> Tensor:
        """The convolution's output, in the engine's own layout."""
        raise AssertionError("each engine has its own")

    def forward(self) -> Tensor:
        """Inference: no graph."""
        with torch.no_grad():
            return self.run()

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        """Gradients of input and weight."""
        return torch.autograd.grad(self.run(), self.leaves, self.cotangent)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output (N, C), input gradient (N, C) and weight gradient (C, C, 3, 3, 3), comparable over engines."""
        return (self.rows(self.forward()), *self.comparable(*self.forward_and_backward()))

    def rows(self, values: Tensor) -> Tensor:
        """Values of the active voxels in lexicographic order."""
        return values

    def comparable(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the order of rows and of torch's weights."""
        return self.rows(features), weight

    @property
    def input_bytes(self) -> int:
        """Bytes of input and weights."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)


class NativeEngine(Engine):
    """``SparseConv3d``; the voxel set keeps the kernel map."""

    def __init__(self, mask: Tensor, features: Tensor, weight: Tensor, cotangent: Tensor) -> None:
        self.layer = SparseConv3d(*weight.shape[1::-1], bias=False)
        self.layer.weight = nn.Parameter(weight.clone())
        coordinates = nn.functional.pad(mask.nonzero(), (1, 0))
        self.x = SparseTensor(features.clone().requires_grad_(), coordinates, mask.shape, batch_size=1)
        self.leaves = (self.x.features, self.layer.weight)
        self.cotangent = cotangent

    def run(self) -> Tensor:
        """See :class:`Engine`."""
        return self.layer(self.x).features


class DenseEngine(Engine):
    """``torch.nn.functional.conv3d`` on the zero-filled volume."""

    def __init__(self, mask: Tensor, features: Tensor, weight: Tensor, cotangent: Tensor) -> None:
        self.mask = mask
        self.leaves = (self._fill(features).requires_grad_(), weight.clone().requires_grad_())
        self.cotangent = self._fill(cotangent)

    def _fill(self, rows: Tensor) -> Tensor:
        volume = rows.new_zeros(rows.shape[1], *self.mask.shape)
        volume[:, self.mask] = rows.t()
        return volume[None]

    def run(self) -> Tensor:
        """See :class:`Engine`."""
        return nn.functional.conv3d(*self.leaves, padding=1)

    def rows(self, values: Tensor) -> Tensor:
        """See :class:`Engine`."""
        return values[0][:, self.mask].t()


def prepare_case(extent: int, thickness: float, channels: int, names: list[str]) -> dict[str, Engine]:
    """The named engines on one ellipsoid shell with the same random features, weights and output gradient."""
    torch.manual_seed(0)
    mask = ellipsoid_shell(extent, thickness)
    count = int(mask.sum())
    features, cotangent = torch.randn(count, channels), torch.randn(count, channels)
    weight = torch.randn(channels, channels, 3, 3, 3) / (27 * channels) ** 0.5
    engines: dict[str, Engine] = {}
    for name in names:
        engines[name] = _engine_class(name)(mask, features, weight, cotangent)  # type: ignore[call-arg]
    return engines


def _engine_class(name: str) -> type[Engine]:
    if name == "minkowski":
        from minkowski_reference import MinkowskiEngineConvolution

        return MinkowskiEngineConvolution
    return {"native": NativeEngine, "dense": DenseEngine}[name]

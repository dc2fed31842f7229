"""MinkowskiEngine as a reference: its convolution for the benchmark, and the completion network for parity."""

from __future__ import annotations

import collections
import collections.abc
from types import ModuleType

import torch
from sparse_engines import Engine, ellipsoid_shell
from torch import Tensor, nn

from monai_memeff.sparse import SparseCompletionNet, SparseConv3d, SparseConvTranspose3d, SparseTensor


def load() -> ModuleType:
    """Import MinkowskiEngine 0.5.4, which looks for ``Sequence`` and others where Python 3.9 still had them.

    The names are put into ``collections`` for the time of the import only.
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


def unavailable() -> str | None:
    """Why MinkowskiEngine cannot be used here, or None."""
    try:
        load()
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None


def to_minkowski_order(weight: Tensor) -> Tensor:
    """(A, B, k, k, k) with the last axis fastest to (k^3, A, B) with the first spatial axis fastest."""
    return weight.permute(4, 3, 2, 0, 1).flatten(0, 2).contiguous()


class MinkowskiEngineConvolution(Engine):
    """``MinkowskiConvolution``; the coordinate manager keeps the kernel map."""

    def __init__(self, mask: Tensor, features: Tensor, weight: Tensor, cotangent: Tensor) -> None:
        engine = load()
        self.layer = engine.MinkowskiConvolution(*weight.shape[1::-1], kernel_size=3, dimension=3)
        self.layer.kernel = nn.Parameter(to_minkowski_order(weight.transpose(0, 1)))
        coordinates = nn.functional.pad(mask.nonzero(), (1, 0)).int()
        placed = engine.SparseTensor(features.clone(), coordinates)
        if not torch.equal(placed.C, coordinates):
            raise RuntimeError("MinkowskiEngine has reordered the rows.")
        leaf = features.clone().requires_grad_()
        self.x = engine.SparseTensor(
            leaf, coordinate_map_key=placed.coordinate_map_key, coordinate_manager=placed.coordinate_manager
        )
        self.leaves = (leaf, self.layer.kernel)
        self.cotangent = cotangent

    def run(self) -> Tensor:
        """See :class:`Engine`."""
        return self.layer(self.x).F

    def comparable(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Engine`."""
        channels = weight.shape[1]
        return features, weight.view(3, 3, 3, channels, -1).permute(4, 3, 2, 1, 0)

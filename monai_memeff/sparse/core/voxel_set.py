"""The active voxels of one resolution level: sorted keys, the grid they live in, and what was planned for them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from monai_memeff.geometry import key_lists, voxels
from monai_memeff.memory.threads import short_lock

Plan = TypeVar("Plan")
_adding = short_lock()


class VoxelSet:
    """A set of active voxels on a regular grid; the geometry that many sparse tensors share.

    Invariant: ``keys`` is strictly increasing, so rows of every tensor on this set are in lexicographic order of
    (batch, i, j, k). Kernel maps are planned once per set and kept here for as long as the set lives. A coarse set
    holds the fine set it came from; the fine set refers to the coarse one weakly, so nothing is kept alive in a circle.

    Args:
        keys: (N,) int64, strictly increasing, see :func:`monai_memeff.geometry.voxels.coordinates_to_keys`.
        spatial_shape: extents of the grid along (i, j, k), in voxels of this level.
        batch_size: number of volumes.
        stride: voxel size of this level in voxels of the finest one, along (i, j, k).
        finer: the set that this one was coarsened from, if any.
    """

    _own = ("_plans", "_coarser", "_generated")

    def __init__(
        self,
        keys: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        stride: Sequence[int] = (1, 1, 1),
        finer: VoxelSet | None = None,
    ) -> None:
        self.keys = keys
        self.spatial_shape = (int(spatial_shape[0]), int(spatial_shape[1]), int(spatial_shape[2]))
        self.batch_size = int(batch_size)
        self.stride = (int(stride[0]), int(stride[1]), int(stride[2]))
        self.finer = finer
        self._plans: dict[Hashable, object] = {}
        self._coarser: weakref.WeakValueDictionary[tuple[int, ...], VoxelSet] = weakref.WeakValueDictionary()
        self._generated: dict[Hashable, VoxelSet] = {}

    def __len__(self) -> int:
        return self.keys.numel()

    def __getstate__(self) -> dict[str, object]:
        """What is copied or sent to another process: the voxels, without what was planned for them."""
        return {name: value for name, value in vars(self).items() if name not in self._own}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _plans={}, _coarser=weakref.WeakValueDictionary(), _generated={})

    @property
    def device(self) -> torch.device:
        """Where the keys are."""
        return self.keys.device

    @property
    def coordinates(self) -> Tensor:
        """(N, 4) int64 [batch, i, j, k] in voxels of this level."""
        return voxels.keys_to_coordinates(self.keys, self.spatial_shape)

    @property
    def cells(self) -> int:
        """Voxels of the whole grid, active or not, over the batch: keys run from 0 to cells - 1."""
        height, width, depth = self.spatial_shape
        return self.batch_size * height * width * depth

    def planned(self, name: Hashable, plan: Callable[[], Plan]) -> Plan:
        """Return what was planned under ``name``, planning it at the first call."""
        found = self._plans.get(name)
        if found is None:
            found = self._plans.setdefault(name, plan())
        return found  # type: ignore[return-value]

    def forget_plans(self) -> None:
        """Free the kernel maps kept here; they are planned again when needed."""
        self._plans.clear()

    def generated(self, name: Hashable, generate: Callable[[], VoxelSet]) -> VoxelSet:
        """The finer set that was generated from this one under ``name``, generating it at the first call."""
        found = self._generated.get(name)
        return self._generated.setdefault(name, generate()) if found is None else found

    def has_generated(self, other: VoxelSet) -> bool:
        """Whether ``other`` was generated from this set."""
        return any(other is known for known in list(self._generated.values()))

    def to(self, device: torch.device) -> VoxelSet:
        """The same voxels on another device, without what was planned for them and without the finer set."""
        moved = copy.copy(self)
        moved.keys, moved.finer = self.keys.to(device), None
        return moved

    def select(self, rows: Tensor) -> VoxelSet:
        """The subset in increasing rows (M,), or marked by an (N,) boolean mask."""
        return VoxelSet(self.keys[rows], self.spatial_shape, self.batch_size, self.stride, self.finer)

    def with_keys(self, keys: Tensor) -> VoxelSet:
        """Another set of voxels on the same grid; ``keys`` must be strictly increasing."""
        return VoxelSet(keys, self.spatial_shape, self.batch_size, self.stride, self.finer)

    def same_grid(self, other: VoxelSet) -> bool:
        """Whether two sets live on one grid (extents, stride, batch size)."""
        mine = (self.spatial_shape, self.batch_size, self.stride)
        return mine == (other.spatial_shape, other.batch_size, other.stride)

    def coarsened(self, stride: tuple[int, int, int]) -> VoxelSet:
        """The cells of size ``stride`` that hold at least one voxel: the unique values of floor(c / stride).

        The coarse grid has ceil(extent / stride) cells along each axis, so every voxel has a cell.
        """
        known = self._coarser.get(stride)
        if known is None:
            start, step = self._coarse_part(stride)
            shape = tuple(-(-extent // by) for extent, by in zip(self.spatial_shape, stride, strict=True))
            cells = voxels.regrid(start.keys, start.spatial_shape, shape, step, shrink=True)
            scale = tuple(mine * by for mine, by in zip(self.stride, stride, strict=True))
            known = VoxelSet(cells[:0], shape, self.batch_size, scale, finer=self)
            known.keys = key_lists.sorted_unique(cells, known.cells)
            with _adding:  # two threads that come at once get one set: sets are compared by identity
                known = self._coarser.setdefault(stride, known)
        return known

    def _coarse_part(self, stride: tuple[int, ...]) -> tuple[VoxelSet, tuple[int, ...]]:
        """The smallest known set of cells that make up those of size ``stride``, and how many do along each axis."""
        with _adding:
            known_sets = list(self._coarser.items())
        parts = [known for known in known_sets if all(s % k == 0 for s, k in zip(stride, known[0], strict=True))]
        by, start = min(parts, key=lambda known: len(known[1]), default=((1, 1, 1), self))
        return start, tuple(s // k for s, k in zip(stride, by, strict=True))

    def batch_bounds(self) -> list[int]:
        """Row bounds of the batch items: item b owns rows ``bounds[b]`` to ``bounds[b + 1]``."""
        return self.planned("batch_bounds", self._find_batch_bounds)

    def _find_batch_bounds(self) -> list[int]:
        first_keys = torch.arange(self.batch_size + 1, device=self.device) * (self.cells // self.batch_size)
        return torch.searchsorted(self.keys, first_keys).tolist()

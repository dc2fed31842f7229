"""Integer voxel coordinates as sortable keys: pack, sort, look up, unite, coarsen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_EXTENT = 2**18
"""Largest number of voxels along one axis."""

MAX_KEY = 2**63 - 1
"""Keys are signed 64-bit integers."""


TABLE_SPAN = 16
"""A dense table over the grid is used while it has at most this many entries for each voxel, or each look-up."""


def check_extent(spatial_shape: Sequence[int], batch_size: int) -> None:
    """Refuse a grid whose voxels cannot be numbered by 64-bit keys.

    Args:
        spatial_shape: voxels along the axes (i, j, k).
        batch_size: number of volumes that share the key range.

    Raises:
        ValueError: an axis is empty or longer than 2^18, or the whole grid has more than 2^63 - 1 voxels.
    """
    if len(spatial_shape) != 3 or min(spatial_shape) < 1 or max(spatial_shape) > MAX_EXTENT:
        raise ValueError(
            f"spatial_shape must be three extents between 1 and {MAX_EXTENT} (2^18), got {tuple(spatial_shape)}; "
            "crop or resample the volume first."
        )
    voxels = batch_size
    for extent in spatial_shape:
        voxels *= extent
    if batch_size < 1 or voxels > MAX_KEY:
        raise ValueError(
            f"batch_size must be at least 1 and batch_size * voxels at most 2^63 - 1, got batch_size {batch_size} "
            f"with spatial_shape {tuple(spatial_shape)}; use a smaller batch."
        )


def coordinates_to_keys(coordinates: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Number voxels in lexicographic order of (batch, i, j, k).

    Args:
        coordinates: (N, 4) integers [batch, i, j, k], all inside the grid.
        spatial_shape: voxels along the axes (i, j, k).

    Returns:
        (N,) int64 keys ``((batch * H + i) * W + j) * D + k``.
    """
    _, width, depth = spatial_shape
    batch, i, j, k = coordinates.to(torch.int64).unbind(1)
    return ((batch * spatial_shape[0] + i) * width + j) * depth + k


def keys_to_coordinates(keys: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Invert :func:`coordinates_to_keys`: (N,) keys to (N, 4) int64 [batch, i, j, k]."""
    height, width, depth = spatial_shape
    line = keys.div(depth, rounding_mode="floor")
    plane = line.div(width, rounding_mode="floor")
    batch = plane.div(height, rounding_mode="floor")
    return torch.stack((batch, plane - batch * height, line - plane * width, keys - line * depth), dim=1)


def is_strictly_increasing(keys: Tensor) -> bool:
    """Whether (N,) keys are sorted and unique."""
    return bool((keys[1:] > keys[:-1]).all())


class RowLookup:
    """Where the window that begins at a key starts: through a dense table while the grid is small, else by search.

    A window is ``window`` consecutive keys. Of a window that holds a key of the list, the start is that key's slot
    minus the key's place in the window; the slots must agree on it, which they do where they differ as the keys do, or
    by at least ``window``.

    Args:
        keys: (N,) int64, strictly increasing, in 0 ... cells - 1.
        cells: number of keys that the grid has.
        slots: (N,) int32, increasing; None: the rows 0 ... N - 1.
        absent: what is found for a window without a key; default N.
        window: see above; 1 looks up single keys.
        queries: how many keys will be looked up, about; default N. A dense table is worth more look-ups.
    """

    def __init__(
        self,
        keys: Tensor,
        cells: int,
        slots: Tensor | None = None,
        absent: int | None = None,
        window: int = 1,
        queries: int = 0,
    ) -> None:
        self.keys = keys
        self.slots = slots
        self.absent = keys.numel() if absent is None else absent
        self.window = window
        self.starts: Tensor | None = None
        if is_small_grid(cells, max(keys.numel(), queries)):
            self.starts = torch.full((cells + window - 1,), self.absent, dtype=torch.int32, device=keys.device)
            rows = torch.arange(keys.numel(), dtype=torch.int32, device=keys.device) if slots is None else slots
            for back in reversed(range(window)):  # shifted by window - 1, as the first key may be 0
                self.starts[keys + (window - 1 - back)] = rows - back

    def __call__(self, queries: Tensor, out: Tensor | None = None) -> Tensor:
        """Look windows up.

        Args:
            queries: integers of any shape, all in 0 ... cells - 1: the first keys of the windows.
            out: contiguous int32 of the same shape to write into; default a new tensor.

        Returns:
            int32 starts, ``absent`` where no key of the list is in the window.
        """
        out = torch.empty(queries.shape, dtype=torch.int32, device=queries.device) if out is None else out
        if self.starts is not None:
            torch.index_select(self.starts, 0, (queries + (self.window - 1)).flatten(), out=out.view(-1))
        elif self.keys.numel() == 0:
            out.fill_(self.absent)
        else:
            out.copy_(self._search(queries))
        return out

    def _search(self, queries: Tensor) -> Tensor:
        row = torch.searchsorted(self.keys, queries).clamp_(max=self.keys.numel() - 1)
        ahead = self.keys.index_select(0, row.flatten()).view(queries.shape) - queries
        slot = row if self.slots is None else self.slots.index_select(0, row.flatten()).view(queries.shape)
        return torch.where((ahead >= 0) & (ahead < self.window), slot - ahead, self.absent)


def is_small_grid(cells: int, count: int) -> bool:
    """Whether a dense table over the grid costs little beside ``count`` voxels: at most TABLE_SPAN entries for each."""
    return cells <= TABLE_SPAN * max(count, 2**14)


def contains(keys: Tensor, queries: Tensor, cells: int) -> Tensor:
    """Which queries are in a sorted key list: boolean, in the shape of ``queries``."""
    return RowLookup(keys, cells)(queries) < keys.numel()


def sorted_unique(keys: Tensor, cells: int) -> Tensor:
    """Sorted unique values of keys in 0 ... cells - 1, through a bitmap of the grid while that is small."""
    if not is_small_grid(cells, keys.numel()):
        return torch.unique(keys)
    present = torch.zeros(cells, dtype=torch.bool, device=keys.device)
    present[keys] = True
    return present.nonzero()[:, 0]


def unite(first: Tensor, second: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unite two sorted key lists.

    Args:
        first: (N,) int64, strictly increasing.
        second: (M,) int64, strictly increasing.
        cells: number of keys that the grid has.

    Returns:
        The sorted union and the int32 rows of the first and of the second list in it.
    """
    union = sorted_unique(torch.cat((first, second)), cells)
    look_up = RowLookup(union, cells)
    return union, look_up(first), look_up(second)


def regrid(
    keys: Tensor,
    spatial_shape: Sequence[int],
    new_shape: Sequence[int],
    scale: Sequence[int] = (1, 1, 1),
    shift: Sequence[int] = (0, 0, 0),
    shrink: bool = False,
) -> Tensor:
    """Keys of the same voxels on another grid: ``scale * c + shift``, or ``floor(c / scale)`` with ``shrink``.

    Args:
        keys: (N,) int64 on the grid ``spatial_shape``.
        spatial_shape: (H, W, D) of the old grid.
        new_shape: (H', W', D') of the new grid, which must hold every new coordinate.
        scale: factor or divisor per axis.
        shift: added per axis after scaling.
        shrink: divide instead of multiplying.

    Returns:
        (N,) int64 keys, in the order of the old ones.
    """
    if not shrink:
        return _scaled(keys, spatial_shape, new_shape, scale, shift)
    rest, pitch, new_keys = keys, 1, torch.zeros_like(keys)
    for axis in (2, 1, 0):
        higher = rest.div(spatial_shape[axis], rounding_mode="floor")
        coordinate = torch.sub(rest, higher, alpha=spatial_shape[axis])
        new_keys.add_(coordinate.div_(scale[axis], rounding_mode="floor").add_(shift[axis]), alpha=pitch)
        rest, pitch = higher, pitch * new_shape[axis]
    return new_keys.add_(rest, alpha=pitch)


def _scaled(keys: Tensor, old: Sequence[int], new: Sequence[int], scale: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The new key as a linear combination of the old one and of the numbers of its line, its plane and its volume."""
    pitches = (new[1] * new[2], new[2], 1)
    steps = [s * pitch for s, pitch in zip(scale, pitches, strict=True)]
    result = keys * steps[2]
    result += sum(offset * pitch for offset, pitch in zip(shift, pitches, strict=True))
    higher_step = (steps[1], steps[0], new[0] * pitches[0])
    number = keys
    for axis, step, above in zip((2, 1, 0), (steps[2], steps[1], steps[0]), higher_step, strict=True):
        number = number.div(old[axis], rounding_mode="floor")
        result.add_(number, alpha=above - step * old[axis])
    return result

"""Accumulators of the sliding window for the rows under the tiles: a ring that moves along the first spatial axis.

nnU-Net adds every tile to half-precision accumulators of the whole volume. A row gets nothing more once no tile covers
it, so only the rows from the first open one to the end of the present tile are kept, and rows are handed on as they are
complete. Every voxel sees the same additions in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_plugins.lean.predict.files import ScratchFile
from nnunet_plugins.lean.predict.logits import release

IN_MEMORY = 16 * 2**20
"""Bytes of a window that stay in memory; a larger one is a scratch file, of which a part at a time is in memory."""

BLOCK = 16 * 2**20
"""Bytes of logits that are worked on at once."""

Emit = Callable[[int, int, Tensor], None]
"""Takes (row, first class, planes (classes, Y, Z)), complete and divided, padding included."""


class Window:
    """Half-precision accumulators of (C, X, Y, Z), of which ``rows`` rows exist at a time.

    Args:
        shape: (C, X, Y, Z), padded as nnU-Net pads.
        rows: Number of rows that are open at once.
        device: Where tiles are added.
        emit: Gets complete planes.
    """

    def __init__(self, shape: Sequence[int], rows: int, device: torch.device, emit: Emit) -> None:
        self.classes, self.depth, height, width = shape
        self.rows, self.emit, self.done, self.mapping = rows, emit, 0, None
        size = 2 * rows * self.classes * height * width
        ring = (rows, self.classes, height, width)
        if device.type == "cpu" and size > IN_MEMORY:
            self.mapping = ScratchFile(size).map()
            self.sums = torch.frombuffer(self.mapping, dtype=torch.half).view(ring)
        else:
            self.sums = torch.zeros(ring, dtype=torch.half, device=device)
        self.weights = torch.zeros((rows, height, width), dtype=torch.half, device=device)

    def add(self, start: int, area: tuple[slice, slice], tile: Tensor, weight: Tensor | int) -> None:
        """Add a tile (C, rows, y, z), already weighted, whose first row is ``start``; ``weight`` is (rows, y, z)."""
        here = start % self.rows
        before_wrap = min(self.rows - here, tile.shape[1])
        for at, skip, count in ((here, 0, before_wrap), (0, before_wrap, tile.shape[1] - before_wrap)):
            if count:
                self._add_rows(slice(at, at + count), area, tile[:, skip : skip + count])
                part = weight if isinstance(weight, int) else weight[skip : skip + count]
                self.weights[at : at + count, area[0], area[1]] += part

    def _add_rows(self, rows: slice, area: tuple[slice, slice], tile: Tensor) -> None:
        sums = self.sums[rows, :, area[0], area[1]].transpose(0, 1)
        for classes in blocks(self.classes, 4 * tile[0].numel()):
            sums[classes] += tile[classes]
            self._release()

    def finish(self, stop: int) -> None:
        """Hand on the rows before ``stop`` that were not yet, and make them free for others."""
        for row in range(self.done, min(stop, self.depth)):
            at = row % self.rows
            for classes in blocks(self.classes, 2 * self.weights[at].numel()):
                sums = self.sums[at, classes]
                self.emit(row, classes.start, torch.div(sums, self.weights[at]))
                sums.zero_()
                self._release()
            self.weights[at].zero_()
        self.done = max(self.done, stop)

    def _release(self) -> None:
        if self.mapping is not None:
            release(self.mapping)


def blocks(count: int, size: int) -> list[slice]:
    """Cut ``count`` things of ``size`` bytes each into slices of about :data:`BLOCK` bytes."""
    step = max(1, BLOCK // max(size, 1))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def first_open_rows(slicers: Sequence[tuple[Any, ...]]) -> list[int]:
    """For every tile, the first row that it or a later tile covers."""
    opened: list[int] = []
    for slicer in reversed(slicers):
        start = rows_of(slicer)[0]
        opened.append(min(start, opened[-1]) if opened else start)
    return opened[::-1]


def rows_of(slicer: tuple[Any, ...]) -> tuple[int, int]:
    """First and last row (exclusive) of a tile; nnU-Net's 2D tiles name one row by its number."""
    rows = slicer[1]
    return (rows.start, rows.stop) if isinstance(rows, slice) else (rows, rows + 1)


def extents_of(slicer: tuple[Any, ...]) -> list[int]:
    """Spatial extents of a tile: three numbers, or two for one of nnU-Net's 2D tiles."""
    return [part.stop - part.start for part in slicer[1:] if isinstance(part, slice)]

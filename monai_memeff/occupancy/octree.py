"""The octree: labels on nested grids of nodes, queried only where the corners of a cell differ, to the last one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], Tensor]
"""(N, 3) int64 voxel indices -> (N,) labels."""

_CELLS_AT_ONCE = 2**20


def default_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Stride of the coarsest grid per axis: the largest power of two up to a sixteenth of the extent, at most 8.

    On 512^3 voxels the coarsest grid is then 0.2 % of the voxels, on 64^3 it is 1.9 %; an axis of fewer than 32 voxels
    is not thinned.
    """
    return tuple(max(s for s in (1, 2, 4, 8) if s == 1 or s <= extent // 16) for extent in shape)


def node_counts(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Nodes per axis of a grid; 0, stride, 2 stride, ... and always the last voxel."""
    return tuple(-(-(extent - 1) // step) + 1 for extent, step in zip(shape, stride, strict=True))


class NodeGrid:
    """One level of the octree: a label, queried or assumed, at every ``stride``-th voxel and the last one of each axis.

    Neighboring nodes are the corners of cells, and every voxel of the volume lies in one; the last cell of an axis is
    shorter where the stride does not divide the extent. Nodes are named by their flat index in the grid, cells by their
    first corner.

    Args:
        shape: the volume's extents in voxels (H, W, D).
        stride: voxels between nodes per axis.
        labels: (h, w, d) integers; those of nodes that were not queried are assumptions.
        queried: bool (h, w, d).
    """

    def __init__(self, shape: Sequence[int], stride: Sequence[int], labels: Tensor, queried: Tensor) -> None:
        self.shape, self.stride = tuple(shape), tuple(stride)
        self.labels, self.queried = labels, queried
        self._cells = [max(n - 1, 1) for n in labels.shape]  # an axis of one voxel is one cell thick
        strides = torch.empty(labels.shape, device="meta").stride()
        steps = [(0, 1) if n > 1 else (0,) for n in labels.shape]
        self._corners = list(itertools.product(*steps))
        self._offsets = [sum(c * s for c, s in zip(corner, strides, strict=True)) for corner in self._corners]

    def voxels(self, keys: Tensor) -> Tensor:
        """(N, 3) int64 voxel indices of (N,) nodes."""
        axes = zip(self._places(keys), self.stride, self.shape, strict=True)
        return torch.stack([(place * step).clamp_(max=extent - 1) for place, step, extent in axes], dim=-1)

    def query(self, keys: Tensor, evaluate: Evaluate, points_per_pass: int) -> Tensor:
        """Query the labels of nodes, a few at a time.

        Args:
            keys: (N,) nodes, each once and none of them queried before.
            evaluate: the network.
            points_per_pass: points in one call of ``evaluate``.

        Returns:
            The nodes whose label was assumed wrongly.
        """
        labels, wrong = self.labels.view(-1), []
        self.queried.view(-1)[keys] = True
        for part in keys.split(points_per_pass):
            found = evaluate(self.voxels(part)).to(labels)
            wrong.append(part[labels[part] != found])
            labels[part] = found
        return torch.cat(wrong) if wrong else keys

    def boundary_cells(self, cells: Tensor) -> Tensor:
        """Those of the cells (M,) whose corners have more than one label."""
        # A cell is named by its first corner; the other corners lie at fixed steps in the flat grid, so that comparing
        # labels is an indexed read per corner, without coordinates.
        labels, found = self.labels.view(-1), []
        for part in cells.split(_CELLS_AT_ONCE):
            first = labels[part]
            differs = torch.zeros_like(part, dtype=torch.bool)
            for offset in self._offsets[1:]:
                differs |= labels[part + offset] != first
            found.append(part[differs])
        return torch.cat(found) if found else cells

    def all_boundary_cells(self) -> Tensor:
        """All cells whose corners have more than one label."""
        found = []
        for start in range(0, self.labels.numel(), _CELLS_AT_ONCE):
            stop = min(start + _CELLS_AT_ONCE, self.labels.numel())
            keys = torch.arange(start, stop, device=self.labels.device)
            found.append(self.boundary_cells(keys[self._is_cell(self._places(keys))]))
        return torch.cat(found)

    def unqueried(self, cells: Tensor) -> Tensor:
        """The corners of the cells, each cell given once, that were not queried; each corner once."""
        taken, found = self.queried.view(-1), []
        for offset in self._offsets:
            keys = cells + offset
            keys = keys[~taken[keys]]
            taken[keys] = True  # so that the next corner does not find it again
            found.append(keys)
        keys = torch.cat(found)
        taken[keys] = False
        return keys

    def boundary_cells_around(self, keys: Tensor) -> Tensor:
        """The boundary cells that have one of the nodes as a corner, each once."""
        # A node is corner c of the cell that begins c before it. Cells beyond the last node of an axis do not exist,
        # and a flat index would wrap into the next line: hence the check of places.
        places, found = self._places(keys), []
        for corner, offset in zip(self._corners, self._offsets, strict=True):
            inside = self._is_cell([place - c for place, c in zip(places, corner, strict=True)])
            found.append(self.boundary_cells(keys[inside] - offset))
        return torch.unique(torch.cat(found))

    def refined(self) -> NodeGrid:
        """The grid of half the stride; a new node is assumed to have the label of its cell's first corner."""
        stride = tuple(max(s // 2, 1) for s in self.stride)
        # Axis by axis, the last one first: the array is largest for the copies along axis 0, which move whole planes.
        # Axes whose stride is 1 already stay as they are.
        labels, queried = self.labels, self.queried
        for axis, count in reversed(list(enumerate(node_counts(self.shape, stride)))):  # copies of long rows come last
            if stride[axis] < self.stride[axis]:
                labels = _between(labels, axis, count, repeat=True)
                queried = _between(queried, axis, count, repeat=False)
        return NodeGrid(self.shape, stride, labels, queried)

    def children(self, cells: Tensor, finer: NodeGrid) -> Tensor:
        """The cells of the finer grid that cells of this one are divided into, each once."""
        places = self._places(cells)
        halves = [(0,) if a == b else (0, 1) for a, b in zip(self.stride, finer.stride, strict=True)]
        found = []
        for half in itertools.product(*halves):
            parts = [
                p if a == b else 2 * p + h
                for p, h, a, b in zip(places, half, self.stride, finer.stride, strict=True)
            ]  # fmt: skip
            inside = finer._is_cell(parts)
            _, width, depth = finer.labels.shape
            found.append(((parts[0] * width + parts[1]) * depth + parts[2])[inside])
        return torch.cat(found)

    def _places(self, keys: Tensor) -> list[Tensor]:
        """torch.unravel_index of keys that are not negative, in a fraction of its time."""
        _, width, depth = self.labels.shape
        lines = torch.div(keys, depth, rounding_mode="trunc")
        planes = torch.div(lines, width, rounding_mode="trunc")
        return [planes, lines - planes * width, keys - lines * depth]

    def _is_cell(self, places: Sequence[Tensor]) -> Tensor:
        inside = torch.ones_like(places[0], dtype=torch.bool)
        for place, count in zip(places, self._cells, strict=True):
            inside &= (place >= 0) & (place < count)
        return inside


def _between(nodes: Tensor, axis: int, count: int, repeat: bool) -> Tensor:
    """Put a new node after every node of an axis but the last: of the same value, or zero."""
    old = nodes.movedim(axis, 0)
    shape = list(nodes.shape)
    shape[axis] = count
    result = nodes.new_zeros(shape)
    new = result.movedim(axis, 0)
    new[0::2] = old[: (count + 1) // 2]
    if repeat:
        new[1::2] = old[: count // 2]
    new[-1] = old[-1]  # the last voxel of an axis is a node of every level
    return result


def propagate(grid: NodeGrid, cells: Tensor, evaluate: Evaluate, points_per_pass: int) -> tuple[Tensor, int]:
    """Query the corners of boundary cells, and of the cells that become boundary cells by this, until nothing changes.

    Args:
        grid: changed in place.
        cells: all its boundary cells, each once.
        evaluate: the network.
        points_per_pass: points in one call of ``evaluate``.

    Returns:
        All boundary cells, each once, their corners now all queried; and the number of rounds with queries.
    """
    # A wrongly assumed corner makes cells around it boundary cells. Only those are looked at in the next round, so the
    # cost of a round is the front's, not the volume's; each point is queried once, which bounds the rounds.
    met, rounds = [cells], 0
    while cells.numel():
        keys = grid.unqueried(cells)
        if not keys.numel():
            break
        rounds += 1
        cells = grid.boundary_cells_around(grid.query(keys, evaluate, points_per_pass))
        met.append(cells)
    return grid.boundary_cells(torch.unique(torch.cat(met))), rounds


def refine(grid: NodeGrid, evaluate: Evaluate, points_per_pass: int) -> Iterator[tuple[NodeGrid, int]]:
    """Propagate on a grid, halve its stride, and so on down to single voxels.

    In the end every cell of 2 x 2 x 2 voxels that has more than one label has all eight of them queried. So the labels
    are those of dense evaluation except for whole 26-connected pieces, surrounded by one label, of which no voxel was
    ever queried.

    Args:
        grid: the coarsest; its labels are queried or assumed.
        evaluate: the network.
        points_per_pass: points in one call of ``evaluate``.

    Yields:
        Every level once nothing changes on it, and its number of rounds.
    """
    cells = grid.all_boundary_cells()
    while True:
        cells, rounds = propagate(grid, cells, evaluate, points_per_pass)
        yield grid, rounds
        if max(grid.stride) == 1:
            return
        finer = grid.refined()
        cells = finer.boundary_cells(grid.children(cells, finer))
        grid = finer

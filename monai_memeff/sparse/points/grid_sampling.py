"""GridSampling3D: one point per cell of a regular grid."""

from __future__ import annotations

from typing import Any

import torch
from monai.transforms import Randomizable
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_finite
from monai_memeff.geometry import voxels
from monai_memeff.sparse.points.data import PointTransform, batch_of, point_attributes, with_attributes

MODES = ("mean", "last")
INDICES = ("batch", "origin_id")
"""Integer attributes that are taken from one point of the cell, as a vote makes no sense."""


class GridSampling3D(Randomizable, PointTransform):
    """Merge the points of every cell of a grid, as torch-points3d's transform of this name.

    A point belongs to cell ``round(pos / size)``, cells of different clouds of a batch apart; the results are in
    lexicographic order of (batch, cell).

    * ``mode="mean"``: positions and floating-point attributes are averaged; of labels (integer or boolean, one per
      point) the most frequent one is taken, the smallest where several tie; ``batch``, ``origin_id`` and integer
      attributes with several columns come from one point of the cell.
    * ``mode="last"``: one random point of the cell with all its attributes, drawn from ``self.R``: call
      ``set_random_state(seed)`` for the same points again.

    Sets ``grid_size``, a tensor of one number. Nothing but torch is needed: no torch_cluster, no torch_scatter.

    Args:
        size: edge of a cell in the unit of ``pos`` (millimeters).
        quantize_coords: also set ``coords``, (M, 3) int32, the cell of every result; negative ones are normal.
        mode: ``"mean"`` or ``"last"``.
        verbose: accepted for old configurations; nothing is logged.

    Raises:
        ValueError: the size is not positive or the mode unknown; the points span more than 2^18 cells along an axis.

    Examples:
        >>> cloud = Data(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.8], [-3.0, 0.0, 0.0]]))
        >>> GridSampling3D(2.0)(cloud).pos
        tensor([[-3.0000,  0.0000,  0.0000],
                [ 0.0000,  0.0000,  0.4000]])
    """

    @numbers_checked
    def __init__(self, size: float, quantize_coords: bool = False, mode: str = "mean", verbose: bool = False) -> None:
        if not 0 < size < float("inf"):
            raise ValueError(f"size must be a positive number in the unit of pos, got {size}.")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
        self.size, self.quantize_coords, self.mode, self.verbose = float(size), quantize_coords, mode, verbose
        self._order: Tensor | None = None

    def randomize(self, data: Any) -> None:
        """Draw the order of which the last point of every cell is kept."""
        self._order = torch.from_numpy(self.R.permutation(len(data.pos))).to(data.pos.device)

    def _process(self, data: Any) -> Any:
        coords = quantized(data.pos, self.size)
        cell, count = cells_of(coords, batch_of(data), self.size)
        if self.mode == "last":
            self.randomize(data)
            assert self._order is not None
            rows = self._order[_last_rows(cell[self._order], count)]
            merged = {name: value[rows] for name, value in point_attributes(data).items()}
        else:
            rows = _last_rows(cell, count)
            merged = {name: _merge(name, value, cell, count, rows) for name, value in point_attributes(data).items()}
        if self.quantize_coords:
            merged["coords"] = coords[rows].to(torch.int32)
        return with_attributes(data, {**merged, "grid_size": data.pos.new_tensor([self.size])})


def quantized(pos: Tensor, size: float) -> Tensor:
    """Cells ``round(pos / size)`` of (N, 3) positions, int64.

    Raises:
        ValueError: a position is NaN or infinite.
    """
    check_finite(pos, "pos")
    return torch.round(pos / size).to(torch.int64)


def cells_of(coords: Tensor, batch: Tensor, size: float) -> tuple[Tensor, int]:
    """Number the cells that hold points.

    Args:
        coords: (N, 3) int64 cells of the points.
        batch: (N,) int64.
        size: edge of a cell, for the message.

    Returns:
        (N,) int64, the number of every point's cell in lexicographic order of (batch, cell); and how many cells hold
        points.

    Raises:
        ValueError: the points span more cells than keys can number.
    """
    if len(coords) == 0:
        return coords.new_zeros(0), 0
    lowest = coords.amin(0)
    extents = (coords.amax(0) - lowest + 1).tolist()
    try:
        voxels.check_extent(extents, int(batch.max()) + 1)
    except ValueError as error:
        raise ValueError(
            f"the points span {extents} cells of {size:g}, and at most {voxels.MAX_EXTENT} per axis and 2^63 - 1 over "
            "the batch can be numbered; use a larger size or remove far points."
        ) from error
    keys = voxels.coordinates_to_keys(torch.cat((batch[:, None], coords - lowest), dim=1), extents)
    found, cell = torch.unique(keys, return_inverse=True)
    return cell, len(found)


def most_frequent(labels: Tensor, cell: Tensor, count: int) -> Tensor:
    """The most frequent label of every cell, the smallest one where several tie.

    Args:
        labels: (N,) integers or booleans.
        cell: (N,) int64, the cell of every point; each of ``count`` cells holds one at least.
        count: number of cells.

    Returns:
        (count,) of the labels' dtype.
    """
    kinds, kind = torch.unique(labels, return_inverse=True)
    pairs, votes = torch.unique(cell * len(kinds) + kind, return_counts=True)
    where = pairs.div(max(len(kinds), 1), rounding_mode="floor")
    most = votes.new_zeros(count).scatter_reduce(0, where, votes, "amax")
    wins = votes == most[where]
    winner = kind.new_full((count,), len(kinds))
    winner = winner.scatter_reduce(0, where[wins], (pairs - where * len(kinds))[wins], "amin")
    return kinds[winner]


def _merge(name: str, values: Tensor, cell: Tensor, count: int, rows: Tensor) -> Tensor:
    if values.is_floating_point():
        total = values.new_zeros(count, *values.shape[1:]).index_add(0, cell, values)
        points = torch.bincount(cell, minlength=count).to(values.dtype)
        return total / points.view(-1, *(1,) * (values.ndim - 1))
    if name in INDICES or values.numel() != len(values):
        return values[rows]
    return most_frequent(values.reshape(-1), cell, count).view(-1, *values.shape[1:])


def _last_rows(cell: Tensor, count: int) -> Tensor:
    """(count,) the last row of every cell."""
    rows = torch.arange(len(cell), device=cell.device)
    return rows.new_zeros(count).scatter_reduce(0, cell, rows, "amax")

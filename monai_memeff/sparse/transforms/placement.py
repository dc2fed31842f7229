"""Where a coarse grid and a fine grid meet: cells counted, repeated, marked or interpolated on the fine one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.geometry.grid import index_to_unit, resize_affine, sample_at
from monai_memeff.geometry.space import ras_affine

SLIVER = 1e-5
"""Of a voxel: what lies nearer to a face counts as on it, whatever the rounding."""


def voxels_per_cell(extent: int, cells: int) -> list[int]:
    """How many of ``extent`` voxels have their center in each of ``cells`` cells; empty where cells are more."""
    if cells > extent:
        return []
    owner = (2 * torch.arange(extent) + 1) * cells // (2 * extent)
    return torch.bincount(owner, minlength=cells).tolist()


def reduce_axis(volume: Tensor, dim: int, cells: int, counted: bool) -> Tensor:
    """Join the voxels of every cell along one axis; where cells are more than voxels, a cell takes one voxel.

    Args:
        volume: boolean or integers, any shape.
        dim: the axis.
        cells: its new extent.
        counted: how many, int32, instead of whether any.
    """
    sizes = voxels_per_cell(volume.shape[dim], cells)
    if not sizes:
        owner = (2 * torch.arange(cells, device=volume.device) + 1) * volume.shape[dim] // (2 * cells)
        return volume.index_select(dim, owner)
    parts = volume.split(sizes, dim)
    return torch.stack([p.sum(dim, dtype=torch.int32) if counted else p.any(dim) for p in parts], dim)


def fine_to_coarse(coarse: Tensor, fine: Tensor, align: str) -> Tensor:
    """(4, 4) float64: a fractional index in the fine grid to one in the coarse grid, both (C, H, W, D).

    Raises:
        ValueError: ``align`` is "affine" and a tensor has none.
    """
    if align != "extent" and isinstance(coarse, MetaTensor) and isinstance(fine, MetaTensor):
        to_fine = torch.linalg.solve(ras_affine(fine).cpu(), ras_affine(coarse).cpu())
    elif align == "affine":
        raise ValueError('align="affine" needs two MetaTensors, got a plain array; use align="extent".')
    else:
        to_fine = resize_affine(torch.eye(4), fine.shape[1:], coarse.shape[1:])
    return torch.linalg.inv(to_fine).to(coarse.device)


def repeat_cells(cells: Tensor, to_coarse: Tensor, shape: Sequence[int]) -> Tensor:
    """Nearest up-sampling: every fine voxel takes the cell that holds its center, 0 outside.

    Args:
        cells: (C, h, w, d).
        to_coarse: (4, 4), see :func:`fine_to_coarse`.
        shape: (H, W, D) of the fine grid.

    Returns:
        (C, H, W, D) in the dtype of ``cells``.
    """
    scale, shift = to_coarse[:3, :3], to_coarse[:3, 3]
    if not torch.allclose(scale, torch.diag(scale.diagonal()), atol=SLIVER / max(shape)):
        return _repeat_tilted(cells, to_coarse, shape)
    for axis, extent in enumerate(shape):
        index = _voxel_of(torch.arange(extent, device=cells.device) * scale[axis, axis] + shift[axis])
        outside = (index < 0) | (index >= cells.shape[1 + axis])
        cells = cells.index_select(1 + axis, index.clamp(0, cells.shape[1 + axis] - 1))
        cells.index_fill_(1 + axis, outside.nonzero()[:, 0], 0)
    return cells


def mark_cells(cells: Tensor, to_coarse: Tensor, shape: Sequence[int], corner: bool) -> Tensor:
    """One fine voxel per occupied cell: that at the cell's center, or at its first corner.

    Args:
        cells: (C, h, w, d), non-zero where occupied.
        to_coarse: (4, 4), see :func:`fine_to_coarse`.
        shape: (H, W, D) of the fine grid.
        corner: the corner instead of the center.

    Returns:
        (C, H, W, D) of 0 and 1 in the dtype of ``cells``.
    """
    to_fine = torch.linalg.inv(to_coarse)
    where = cells.nonzero()
    within = SLIVER - 0.5 if corner else 0.0
    index = _voxel_of((where[:, 1:].double() + within) @ to_fine[:3, :3].T + to_fine[:3, 3])
    inside = ((index >= 0) & (index < torch.tensor(shape, device=index.device))).all(1)
    placed = cells.new_zeros((len(cells), *shape))
    placed[where[inside, 0], index[inside, 0], index[inside, 1], index[inside, 2]] = 1
    return placed


def interpolate_cells(values: Tensor, to_coarse: Tensor, shape: Sequence[int]) -> Tensor:
    """Trilinear values between the centers of cells, constant beyond the outer centers, 0 outside of the volume.

    Args:
        values: (C, h, w, d) floating point.
        to_coarse: (4, 4), see :func:`fine_to_coarse`.
        shape: (H, W, D) of the fine grid.

    Returns:
        (C, H, W, D) floating point.
    """
    placed = values.new_zeros((len(values), *shape))
    for slab, position in enumerate(_slabs(to_coarse, shape)):
        unit = index_to_unit(position, values.shape[1:])
        found = sample_at(values[None], unit.reshape(1, -1, 3).to(values.dtype))[0].view(-1, *shape[1:])
        placed[:, slab] = found * (unit.abs() <= 1 + SLIVER).all(-1)
    return placed


def _repeat_tilted(cells: Tensor, to_coarse: Tensor, shape: Sequence[int]) -> Tensor:
    placed = cells.new_zeros((len(cells), *shape))
    extent = torch.tensor(cells.shape[1:], device=cells.device)
    steps = torch.tensor([cells.shape[2] * cells.shape[3], cells.shape[3], 1], device=cells.device)
    for slab, position in enumerate(_slabs(to_coarse, shape)):
        index = _voxel_of(position)
        inside = ((index >= 0) & (index < extent)).all(-1)
        placed[:, slab][:, inside] = cells.flatten(1)[:, (index[inside] * steps).sum(-1)]
    return placed


def _slabs(to_coarse: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """Coarse positions (W, D, 3) of one slab of the fine grid after another: a full grid of them is never held."""
    rows, columns, lines = (
        torch.arange(n, device=to_coarse.device, dtype=torch.float64)[:, None] * to_coarse[:3, axis]
        for axis, n in enumerate(shape)
    )
    plane = columns[:, None] + lines[None] + to_coarse[:3, 3]
    for row in rows:
        yield plane + row


def _voxel_of(position: Tensor) -> Tensor:
    """The voxel that holds a fractional index; a voxel owns its lower face."""
    return (position + (0.5 + SLIVER)).floor().long()

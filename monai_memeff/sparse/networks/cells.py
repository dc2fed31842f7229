"""Cells of voxels: which ones are worth computing at full resolution, and what lies between their centers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from monai_memeff.sparse.core.tensor import SparseTensor


@torch.no_grad()
def choose_cells(
    coarse_logits: Tensor,
    sizes: Tensor,
    limit: int,
    certainty: float = 0.95,
    dilation: int = 1,
    sigmoid: bool = False,
) -> Tensor:
    """Choose the cells worth computing at full resolution.

    A cell is worth it when it is not background with probability ``certainty``, or lies within ``dilation`` cells of
    such a cell. Where these hold more than ``limit`` voxels, the most uncertain go first: half a cell's rank is its own
    uncertainty (1 minus the distance of its two largest class probabilities), half the largest one in reach.

    Args:
        coarse_logits: (B, K, h, w, d), background in channel 0 unless ``sigmoid``.
        sizes: (h, w, d) voxels in each cell.
        limit: voxels allowed per volume.
        certainty: see above.
        dilation: Dilation in cells.
        sigmoid: each channel is a class of its own.

    Returns:
        (B, 1, h, w, d) boolean; ties in rank go to the first cell in memory order.
    """
    background, uncertainty = _background_and_uncertainty(coarse_logits.float(), sigmoid)
    worth = _dilated((background < certainty).float(), dilation) > 0
    rank = uncertainty + _dilated(uncertainty, dilation)
    order = rank.masked_fill(~worth, -1.0).flatten(1).sort(dim=1, descending=True, stable=True).indices
    within = sizes.flatten()[order].cumsum(1) <= limit
    chosen = torch.zeros_like(within).scatter(1, order, within)
    return chosen.view_as(worth) & worth


def _background_and_uncertainty(logits: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Probability of background, and how undecided the classes are, both (B, 1, h, w, d)."""
    if sigmoid:
        probabilities = logits.sigmoid()
        undecided = 1 - (2 * probabilities - 1).abs()
        return 1 - probabilities.amax(1, keepdim=True), undecided.amax(1, keepdim=True)
    probabilities = logits.softmax(1)
    first, which = probabilities.max(1, keepdim=True)  # twice, as topk on CUDA takes a block of threads for each cell
    second = probabilities.scatter(1, which, -1.0).amax(1, keepdim=True)
    return probabilities[:, :1], 1 - (first - second)


def _dilated(volume: Tensor, reach: int) -> Tensor:
    return functional.max_pool3d(volume, 2 * reach + 1, stride=1, padding=reach)


def cell_sizes(shape: Sequence[int], factor: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Voxels in each cell of a volume, (h, w, d) int64; the last cell of an axis may be cut off."""
    along = [
        torch.tensor([min(step, extent - start) for start in range(0, extent, step)], device=device)
        for extent, step in zip(shape, factor, strict=True)
    ]
    return along[0][:, None, None] * along[1][:, None] * along[2]


def cells_to_voxels(cells: Tensor, factor: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Repeat every cell (B, C, h, w, d) over its voxels: (B, C, H, W, D)."""
    for axis, step in enumerate(factor):
        cells = cells.repeat_interleave(step, dim=axis + 2)
    return cells[:, :, : shape[0], : shape[1], : shape[2]]


def upsample(cells: Tensor, factor: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Interpolate values at cell centers (B, C, h, w, d) trilinearly to the voxel centers (B, C, H, W, D)."""
    scale = tuple(float(step) for step in factor)
    volume = functional.interpolate(cells, scale_factor=scale, mode="trilinear", align_corners=False)
    return volume[:, :, : shape[0], : shape[1], : shape[2]]


def interpolated_at(cells: Tensor, where: SparseTensor, factor: Sequence[int]) -> Tensor:
    """What :func:`upsample` gives at the voxels of a sparse tensor: (B, C, h, w, d) -> (N, C)."""
    extents = torch.tensor(cells.shape[2:], device=cells.device)
    steps = torch.tensor(factor, device=cells.device)
    bounds = where.voxels.batch_bounds()
    centers = (where.coordinates[:, 1:] + 0.5).to(cells.dtype if cells.dtype == torch.float64 else torch.float32)
    grid = (2 * centers / (steps * extents) - 1).flip(1)  # grid_sample wants (k, j, i) in [-1, 1]
    rows = [
        functional.grid_sample(
            item[None].to(grid.dtype), grid[None, start:stop, None, None], "bilinear", "border", align_corners=False
        )[0, :, :, 0, 0].t()
        for item, start, stop in zip(cells, bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(rows)


def scatter_add_rows(volume: Tensor, rows: SparseTensor) -> Tensor:
    """Add the features of a sparse tensor to a dense volume (B, C, H, W, D); differentiable in both.

    Leaner than ``volume + rows.dense()``: there is no second dense volume, and none in the backward pass.
    """
    channels = volume.shape[1]
    cells = rows.voxels.cells // rows.batch_size
    batch = rows.voxels.keys.div(cells, rounding_mode="floor")
    first = rows.voxels.keys + batch * (cells * (channels - 1))  # where channel 0 of the voxel lies in memory
    index = first[:, None] + cells * torch.arange(channels, device=volume.device)
    flat = volume.reshape(-1).index_add(0, index.flatten(), rows.features.flatten().to(volume.dtype))
    return flat.view(volume.shape)

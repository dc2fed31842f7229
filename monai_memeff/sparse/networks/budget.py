"""Voxel budgets: how many candidates a generative network may have at a level, so that memory has a bound."""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from torch import Tensor

from monai_memeff.errors import InputError
from monai_memeff.geometry import key_lists, voxels
from monai_memeff.sparse.core.voxel_set import VoxelSet


def check_budget(present: VoxelSet, max_voxels: int | None) -> None:
    """Refuse an input that is larger than the budget by itself.

    Args:
        present: voxels of the input.
        max_voxels: allowed for each volume of the batch, None for any number.

    Raises:
        ValueError: a volume has more voxels than ``max_voxels``.
    """
    if max_voxels is None:
        return
    largest = max(stop - start for start, stop in pairwise(present.batch_bounds()))
    if largest > max_voxels:
        raise ValueError(
            f"a volume may have max_voxels = {max_voxels} voxels, got {largest}; raise max_voxels, crop the volume, or "
            "take its surface only."
        )


def check_candidates(grown: VoxelSet, present: VoxelSet, max_voxels: int | None) -> None:
    """Refuse a first level, where no logits say yet what may be left out, with more candidates than the budget.

    Args:
        grown: voxels that were generated.
        present: voxels of the encoder at the same level.
        max_voxels: candidates allowed for each volume of the batch, None for any number.

    Raises:
        InputError: a volume has more.
    """
    if max_voxels is None:
        return
    level = grown.with_keys(key_lists.unite(grown.keys, present.keys, grown.cells)[0])
    largest = max(stop - start for start, stop in pairwise(level.batch_bounds()))
    if largest > max_voxels:
        raise InputError(
            f"at stride {grown.stride[0]}, the first level, a volume has {largest} candidates, max_voxels = "
            f"{max_voxels} are allowed; raise max_voxels to {largest} or more, or crop the volume."
        )


def prune_to_budget(keep: Tensor, rank: Tensor, level: VoxelSet, present: VoxelSet, max_voxels: int | None) -> Tensor:
    """Keep the voxels with the largest rank where all that are marked would make more candidates than the budget.

    The candidates of the next level are the children of the voxels that are kept, and the encoder's own voxels there.
    A voxel counts with the children that it adds to the latter.

    Args:
        keep: (N,) boolean, voxels to be refined.
        rank: (N,) their importance; of equal ones those with the smaller coordinates go first.
        level: where they are.
        present: voxels of the encoder at the next level, twice as fine.
        max_voxels: candidates allowed at the next level, for each volume of the batch; None for any number.

    Returns:
        (N,) boolean; with them no volume has more than ``max_voxels`` candidates, unless ``present`` alone has.

    Warns:
        UserWarning: voxels were left out.
    """
    if max_voxels is None:
        return keep
    added = added_candidates(level, present)
    bounds = zip(pairwise(level.batch_bounds()), pairwise(present.batch_bounds()), strict=True)
    kept = [_best(keep[a:b], rank[a:b], added[a:b], d - c, max_voxels, level.stride[0]) for (a, b), (c, d) in bounds]
    return torch.cat(kept)


def added_candidates(level: VoxelSet, present: VoxelSet) -> Tensor:
    """(N,) children of every voxel that lie in the grid and not in ``present``, which is twice as fine."""
    if len(level) == 0:
        return level.keys
    extents = torch.tensor(present.spatial_shape, device=level.device)
    children = (extents - 2 * level.coordinates[:, 1:]).clamp_(0, 2).prod(1)
    parents = voxels.regrid(present.keys, present.spatial_shape, level.spatial_shape, (2, 2, 2), shrink=True)
    place = torch.searchsorted(level.keys, parents).clamp_(max=len(level) - 1)
    known = level.keys[place] == parents
    return children - torch.bincount(place[known], minlength=len(level))


def _best(keep: Tensor, rank: Tensor, added: Tensor, present: int, max_voxels: int, stride: int) -> Tensor:
    wanted = present + int(added[keep].sum())
    if wanted <= max_voxels:
        return keep
    order = rank.masked_fill(~keep, -torch.inf).sort(descending=True, stable=True).indices
    order = order[: int(keep.count_nonzero())]
    chosen = order[added[order].cumsum(0) <= max_voxels - present]
    warnings.warn(
        f"at stride {stride} a volume would be refined to {wanted} candidates, max_voxels = {max_voxels} are allowed: "
        f"the {len(chosen)} of {len(order)} voxels with the largest logits go on. Raise max_voxels, train longer, or "
        "take a coarser grid.",
        stacklevel=2,
    )
    return torch.zeros_like(keep).index_fill_(0, chosen, True)

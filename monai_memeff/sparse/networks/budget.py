"""Voxel budgets: how many voxels a generative network may go on with, so that memory has a bound."""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from torch import Tensor

from monai_memeff.sparse.core.voxel_set import VoxelSet

CHILDREN = 8
"""Voxels that one voxel is refined to by a generative convolution of stride 2 and kernel 2."""


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


def prune_to_budget(keep: Tensor, rank: Tensor, level: VoxelSet, max_voxels: int | None) -> Tensor:
    """Keep the voxels with the largest rank where all that are marked would be refined to more than the budget.

    Args:
        keep: (N,) boolean, voxels that ask to be refined.
        rank: (N,) their importance; of equal ones those with the smaller coordinates go first.
        level: where they are.
        max_voxels: voxels allowed after the refinement, for each volume of the batch; None for any number.

    Returns:
        (N,) boolean, at most ``max_voxels // 8`` voxels of each volume.

    Warns:
        UserWarning: voxels were left out.
    """
    if max_voxels is None:
        return keep
    limit = max_voxels // CHILDREN
    kept = [_best(keep[a:b], rank[a:b], limit, level.stride[0]) for a, b in pairwise(level.batch_bounds())]
    return torch.cat(kept)


def _best(keep: Tensor, rank: Tensor, limit: int, stride: int) -> Tensor:
    asked = int(keep.count_nonzero())
    if asked <= limit:
        return keep
    warnings.warn(
        f"at stride {stride} a volume would be refined to {CHILDREN * asked} voxels, max_voxels = {CHILDREN * limit} "
        f"are allowed: the {limit} of {asked} with the largest logits go on. Raise max_voxels, train longer, or take a "
        "coarser grid.",
        stacklevel=2,
    )
    order = rank.masked_fill(~keep, -torch.inf).sort(descending=True, stable=True).indices
    return torch.zeros_like(keep).index_fill_(0, order[:limit], True)

"""The annotated part of a target: which voxels are foreground, and which cells nobody has judged."""

from __future__ import annotations

from numbers import Integral

from torch import Tensor

from monai_memeff.checks import check_mask
from monai_memeff.sparse.core.tensor import SparseTensor, nonzero_voxels
from monai_memeff.sparse.core.voxel_set import VoxelSet


def check_ignore_index(ignore_index: int | None) -> int | None:
    """The label as it is; ValueError for 0, which sparse targets do not list."""
    if ignore_index is not None and not isinstance(ignore_index, Integral):
        raise ValueError(f"ignore_index must be a whole number, got {ignore_index!r}; labels have no fractions.")
    if ignore_index == 0:
        raise ValueError("ignore_index must not be 0, the background of sparse targets; give ignored voxels a label.")
    return ignore_index


def foreground_and_ignored(
    target: SparseTensor | Tensor, ignore_index: int | None
) -> tuple[SparseTensor, VoxelSet | None]:
    """The structure and the ignored voxels of a target.

    Args:
        target: sparse, or dense (B, 1, H, W, D); voxels that are neither zero nor ``ignore_index`` are foreground.
        ignore_index: label of voxels without annotation; None: there are none.

    Raises:
        InputError: a dense target has negative voxels, as logits have.
    """
    found = nonzero_voxels(target)
    if ignore_index is None:
        structure, unknown = found, None
    else:
        ignored = found.features[:, 0] == ignore_index
        structure, unknown = found.prune(~ignored), found.voxels.select(ignored)
    if isinstance(target, Tensor):
        check_mask(structure.features, "a target of the completion network")
    return structure, unknown

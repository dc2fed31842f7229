"""The completion network's loss: binary cross-entropy over the candidates of every level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses.focal_loss import sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional

from monai_memeff.arguments import numbers_checked
from monai_memeff.geometry import key_lists
from monai_memeff.sparse.core.annotation import check_ignore_index, foreground_and_ignored
from monai_memeff.sparse.core.tensor import SparseTensor
from monai_memeff.sparse.core.voxel_set import VoxelSet


class SparseCompletionLoss(nn.Module):
    """Unweighted sum over levels of the mean binary cross-entropy of the candidate logits.

    A candidate's target is 1 where the complete structure, coarsened to the level by floor(c / stride), has a voxel
    (Kroviakov et al. 2021; Li et al. 2023, see :class:`SparseCompletionNet`). A level without candidates adds zero.

    Args:
        ignore_index: Label of voxels without annotation, in the values of the target; not 0. Candidates that hold
            such voxels and none of the structure do not count: nobody knows whether they are empty. Give the network
            the same number.
        gamma: Focusing parameter of Lin et al. 2017 (arXiv 1708.02002, section 3.2): the loss of a candidate is
            weighted by (1 - p)^gamma, p the probability of its right answer. 0, as published, weights all alike; 2
            turns to the missing piece soon, since most candidates repeat the input and are easy.

    Raises:
        ValueError: gamma is negative, infinite or NaN, or ``ignore_index`` is 0 or a fraction.

    Examples:
        >>> logits = SparseTensor(torch.zeros(1, 1), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseCompletionLoss()([logits], torch.ones(1, 1, 4, 4, 4))
        tensor(0.6931)
    """

    @numbers_checked
    def __init__(self, ignore_index: int | None = None, gamma: float = 0.0) -> None:
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma must be finite and not negative, got {gamma}; 0 weights all candidates alike.")
        self.ignore_index = check_ignore_index(ignore_index)
        self.gamma = gamma

    def forward(self, levels: Sequence[SparseTensor], target: SparseTensor | Tensor) -> Tensor:
        """Compute the loss.

        Args:
            levels: candidate logits (N_level, 1), as :class:`SparseCompletionNet` returns in training; any order.
            target: the complete structure at full resolution, sparse or dense (B, 1, H, W, D).

        Returns:
            A scalar, in float32 at least.

        Raises:
            ValueError: target and logits lie on different grids, or no level is given.
        """
        if not levels:
            raise ValueError("SparseCompletionLoss needs at least one level of logits, got none.")
        structure, ignored = foreground_and_ignored(target, self.ignore_index)
        complete = structure.voxels
        cells = {complete.stride: complete}  # a coarse level is made of the finer one's cells while these are kept
        for stride in sorted(logits.stride for logits in levels):
            cells[stride] = cells[stride] if stride in cells else complete.coarsened(stride)
        return torch.stack([self._level(logits, cells[logits.stride], ignored) for logits in levels]).sum()

    def _level(self, logits: SparseTensor, cells: VoxelSet, ignored: VoxelSet | None) -> Tensor:
        values = logits.features[:, 0]
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        if not cells.same_grid(logits.voxels):
            raise ValueError(
                f"the target does not lie on the grid of the logits: at stride {logits.stride} "
                f"(batch_size, spatial_shape) must be {(logits.batch_size, logits.spatial_shape)}, "
                f"got {(cells.batch_size, cells.spatial_shape)}."
            )
        truth = key_lists.contains(cells.keys, logits.voxels.keys, cells.cells)
        if ignored is not None and len(ignored):
            doubtful = ignored.coarsened(_ratio(logits.stride, ignored.stride))
            counted = truth | ~key_lists.contains(doubtful.keys, logits.voxels.keys, doubtful.cells)
            values, truth = values[counted], truth[counted]
        if len(values) == 0:
            return values.sum()
        truth = truth.to(values.dtype)
        if self.gamma == 0:
            return functional.binary_cross_entropy_with_logits(values, truth)
        return sigmoid_focal_loss(values, truth, self.gamma).mean()


def _ratio(coarse: tuple[int, int, int], fine: tuple[int, int, int]) -> tuple[int, int, int]:
    i, j, k = (large // small for large, small in zip(coarse, fine, strict=True))
    return i, j, k

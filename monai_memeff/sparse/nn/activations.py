"""Activations and dropout on the features of sparse tensors; inactive voxels stay inactive."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from monai_memeff.sparse.core.tensor import SparseTensor


class _Featurewise(nn.Module):
    """Mixin: apply a module that works on single values to the features."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Apply to (N, C) features."""
        return x.replace(super().forward(x.features))


class SparseReLU(_Featurewise, nn.ReLU):
    """``torch.nn.ReLU`` on the features of a SparseTensor, (N, C) to (N, C).

    Examples:
        >>> x = SparseTensor(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseReLU()(x).features
        tensor([[0., 2.]])
    """


class SparseLeakyReLU(_Featurewise, nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` on the features of a SparseTensor, (N, C) to (N, C).

    Examples:
        >>> x = SparseTensor(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseLeakyReLU(0.1)(x).features
        tensor([[-0.1000,  2.0000]])
    """


class SparsePReLU(_Featurewise, nn.PReLU):
    """``torch.nn.PReLU`` on the features of a SparseTensor, (N, C) to (N, C), with 1 or C learned slopes.

    Examples:
        >>> x = SparseTensor(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparsePReLU()(x).features.tolist()
        [[-0.25, 2.0]]
    """


class SparseELU(_Featurewise, nn.ELU):
    """``torch.nn.ELU`` on the features of a SparseTensor, (N, C) to (N, C).

    Examples:
        >>> x = SparseTensor(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseELU()(x).features
        tensor([[-0.6321,  2.0000]])
    """


class SparseGELU(_Featurewise, nn.GELU):
    """``torch.nn.GELU`` on the features of a SparseTensor, (N, C) to (N, C).

    Examples:
        >>> x = SparseTensor(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseGELU()(x).features
        tensor([[-0.1587,  1.9545]])
    """


class SparseSiLU(_Featurewise, nn.SiLU):
    """``torch.nn.SiLU`` on the features of a SparseTensor, (N, C) to (N, C).

    Examples:
        >>> x = SparseTensor(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseSiLU()(x).features
        tensor([[-0.2689,  1.7616]])
    """


class SparseSigmoid(_Featurewise, nn.Sigmoid):
    """``torch.nn.Sigmoid`` on the features of a SparseTensor, (N, C) to (N, C); inactive voxels stay inactive.

    Examples:
        >>> x = SparseTensor(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseSigmoid()(x).features
        tensor([[0.2689, 0.8808]])
    """


class SparseTanh(_Featurewise, nn.Tanh):
    """``torch.nn.Tanh`` on the features of a SparseTensor, (N, C) to (N, C).

    Examples:
        >>> x = SparseTensor(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseTanh()(x).features
        tensor([[-0.7616,  0.9640]])
    """


class SparseDropout(_Featurewise, nn.Dropout):
    """``torch.nn.Dropout`` on single feature values of a SparseTensor, (N, C) to (N, C); in training only.

    Examples:
        >>> x = SparseTensor(torch.ones(1, 2), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseDropout(0.5).eval()(x).features
        tensor([[1., 1.]])
    """


class SparseDropout3d(nn.Dropout3d):
    """Drop whole channels of a batch item, as ``torch.nn.Dropout3d`` on volumes; (N, C) to (N, C), in training only.

    Examples:
        >>> x = SparseTensor(torch.ones(2, 1), torch.tensor([[0, 1, 2, 3], [0, 3, 2, 1]]), (4, 4, 4))
        >>> SparseDropout3d(0.5)(x).features.unique().numel()  # both voxels lose the channel, or none
        1
    """

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Apply to (N, C) features."""
        if not self.training or self.p == 0:
            return x
        keep = functional.dropout(x.features.new_ones(x.batch_size, x.features.shape[1]), self.p)
        bounds = torch.tensor(x.voxels.batch_bounds(), device=x.device)
        return x.replace(x.features * keep.repeat_interleave(bounds.diff(), dim=0))


def slope_below_zero(act: nn.Module | None) -> float | Tensor | None:
    """The slope of an activation that is linear on either side of zero, learned or not; None for any other."""
    if type(act) is SparseReLU:
        return 0.0
    if type(act) is SparseLeakyReLU:
        return act.negative_slope
    return act.weight if type(act) is SparsePReLU else None

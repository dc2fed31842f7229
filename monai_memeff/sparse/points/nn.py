"""The six names of torch-points3d's ``modules.SparseConv3d.nn`` on this package's layers, and ``set_backend``."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import as_device
from monai_memeff.sparse import backends
from monai_memeff.sparse.backends import registry
from monai_memeff.sparse.core import tensor as sparse_tensor
from monai_memeff.sparse.nn import activations, blocks, conv
from monai_memeff.sparse.points.placed import place

__all__ = ["BatchNorm", "Conv3d", "Conv3dTranspose", "ReLU", "SparseTensor", "cat", "set_backend"]

ENVIRONMENT_VARIABLE = "SPARSE_BACKEND"
"""What torch-points3d's users set; it counts only where MEMEFF_SPARSE_BACKEND and ``set_backend`` say nothing."""

TORCHSPARSE = (
    "torchsparse is not supported: it is on no package index and its own wheel index is gone. Use "
    "set_backend('native'), which needs nothing else; the layers, their results and these names stay the same"
)


class Conv3d(conv.SparseConv3d):
    """:class:`monai_memeff.sparse.SparseConv3d` with torch-points3d's default of no bias.

    Args:
        in_channels: features per input voxel.
        out_channels: features per output voxel.
        kernel_size: one number or one per axis.
        stride: one number or one per axis; 1 keeps the voxels.
        dilation: spacing of the kernel's points.
        bias: whether to learn an additive bias.

    Examples:
        >>> x = SparseTensor(torch.ones(2, 1), torch.tensor([[-1, 0, 0], [3, 4, 5]]))
        >>> Conv3d(1, 4)(x).features.shape
        torch.Size([2, 4])
    """

    @numbers_checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: conv.Size = 3,
        stride: conv.Size = 1,
        dilation: conv.Size = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, bias)


class Conv3dTranspose(conv.SparseConvTranspose3d):
    """:class:`monai_memeff.sparse.SparseConvTranspose3d` back onto the voxels that its input was coarsened from.

    Args:
        in_channels: features per input voxel.
        out_channels: features per output voxel.
        kernel_size: one number or one per axis.
        stride: one number or one per axis; that of the convolution which is undone. 1 keeps the voxels.
        dilation: spacing of the kernel's points.
        bias: whether to learn an additive bias.
        transpose: accepted as in torch-points3d, where it did nothing either: the layer is always transposed.

    Examples:
        >>> x = SparseTensor(torch.ones(2, 1), torch.tensor([[-1, 0, 0], [3, 4, 5]]))
        >>> coarse = Conv3d(1, 4, kernel_size=2, stride=2)(x)
        >>> Conv3dTranspose(4, 1, kernel_size=2, stride=2)(coarse).features.shape
        torch.Size([2, 1])
    """

    @numbers_checked
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: conv.Size = 3,
        stride: conv.Size = 1,
        dilation: conv.Size = 1,
        bias: bool = False,
        transpose: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, bias)


class BatchNorm(blocks.SparseBatchNorm3d):
    """:class:`monai_memeff.sparse.SparseBatchNorm3d` with torch-points3d's arguments.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: Momentum of the running statistics.

    Examples:
        >>> x = SparseTensor(torch.ones(2, 1), torch.tensor([[-1, 0, 0], [3, 4, 5]]))
        >>> BatchNorm(1)(x).features.shape
        torch.Size([2, 1])
    """

    @numbers_checked
    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)


class ReLU(activations.SparseReLU):
    """:class:`monai_memeff.sparse.SparseReLU`, never in place, as torch-points3d's on MinkowskiEngine.

    Args:
        inplace: accepted, and without effect: features may be shared with a skip connection.

    Examples:
        >>> ReLU()(SparseTensor(torch.tensor([[-1.0]]), torch.tensor([[3, 4, 5]]))).features
        tensor([[0.]])
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(inplace=False)


def cat(*args: sparse_tensor.SparseTensor) -> sparse_tensor.SparseTensor:
    """Stack the channels of tensors of one level; a voxel that one of them lacks counts as zero there.

    Raises:
        ValueError: no tensor is given, or the grids differ.

    Examples:
        >>> x = SparseTensor(torch.ones(2, 1), torch.tensor([[-1, 0, 0], [3, 4, 5]]))
        >>> cat(x, x).features.shape
        torch.Size([2, 2])
    """
    return sparse_tensor.concatenate_channels(args)


def SparseTensor(  # noqa: N802 - torch-points3d's name
    feats: Tensor, coordinates: Tensor, batch: Tensor | None = None, device: torch.device | str | None = None
) -> sparse_tensor.SparseTensor:
    """Features on voxels with any integer coordinates, negative ones included.

    The rows are sorted; ``monai_memeff.sparse.points.placed_coordinates`` gives the coordinates of the sorted rows, and
    ``data_from_sparse`` the features in the order of the points.

    Args:
        feats: (N, C) floating point.
        coordinates: (N, 3) integers, unique within each cloud, as ``GridSampling3D(quantize_coords=True)`` sets them.
        batch: (N,) or (N, 1) integers, which cloud each row belongs to; default one cloud.
        device: where to put the tensor; default where ``feats`` are (torch-points3d: the CPU).

    Raises:
        ValueError: shapes or dtypes do not fit, a feature is NaN or infinite, two rows share a voxel, or they span more
            than 2^18 voxels along an axis.

    Examples:
        >>> SparseTensor(torch.ones(2, 8), torch.tensor([[3, 4, 5], [-1, 0, 0]])).features.shape
        torch.Size([2, 8])
    """
    device = feats.device if device is None else as_device(device)
    batch = coordinates.new_zeros(len(coordinates)) if batch is None else batch.reshape(-1)
    if len(batch) != len(coordinates):
        raise ValueError(f"batch must have one entry per row, got {len(batch)} for {len(coordinates)} rows.")
    return place(feats.to(device), coordinates.to(device), batch.to(device))


def set_backend(name: str) -> None:
    """Choose the engine of the convolutions, for this process.

    Args:
        name: a name of ``monai_memeff.sparse.backends``, or "auto": ``"native"`` always works.

    Raises:
        ValueError: the name is unknown or the engine cannot be used here; the message says why.

    Examples:
        >>> set_backend("native")
    """
    if name == "torchsparse":
        raise ValueError(f"{TORCHSPARSE}.")
    backends.use(name)


def _take_old_variable() -> None:
    """Pass SPARSE_BACKEND on to our own variable where that is not set and the engine can be used."""
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name or os.environ.get(registry.ENVIRONMENT_VARIABLE):
        return
    reason = TORCHSPARSE if name == "torchsparse" else registry.status().get(name, "no engine has this name")
    if reason is None:
        os.environ[registry.ENVIRONMENT_VARIABLE] = name
    else:
        warnings.warn(f"{ENVIRONMENT_VARIABLE}={name} is passed over: {reason}.")


_take_old_variable()

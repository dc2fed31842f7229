"""Norms over active voxels, and pooling of them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from monai_memeff.arguments import numbers_checked
from monai_memeff.sparse.core.fused import Recompute, norm_act
from monai_memeff.sparse.core.kernel_map import kernel_map_between
from monai_memeff.sparse.core.neighbors import KernelShape
from monai_memeff.sparse.core.tensor import SparseTensor
from monai_memeff.sparse.nn.activations import slope_below_zero
from monai_memeff.sparse.nn.conv import Size, steps


class SparseBatchNorm3d(nn.BatchNorm3d):
    """Batch norm over all active voxels of the batch, (N, C) to (N, C); arguments as ``torch.nn.BatchNorm3d``.

    The ``state_dict`` is torch's too. In training a level with fewer than two active voxels has no variance: it is
    normalized with the running statistics, which then stay as they are, instead of raising as torch does; where none
    are kept, its normalized value is zero.

    Examples:
        >>> where = torch.tensor([[0, 1, 2, 3], [0, 3, 2, 1]])
        >>> x = SparseTensor(torch.tensor([[1.0], [3.0]]), where, (4, 4, 4))
        >>> SparseBatchNorm3d(1)(x).features.flatten().round().tolist()
        [-1.0, 1.0]
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # rows (N, C) instead of a volume

    def forward(self, x: SparseTensor, act: nn.Module | None = None) -> SparseTensor:
        """Normalize (N, C) features.

        Args:
            x: what to normalize.
            act: an activation to apply to the result. ReLU, leaky ReLU and PReLU are fused with the norm: the graph
                then keeps one tensor for norm, activation and the convolution behind them, not two or three.
        """
        slope = slope_below_zero(act)
        if len(x) == 0 or (len(x) < 2 and (self.training or self.running_mean is None)):
            normalized = x.replace(self._without_variance(x.features))
        elif slope is not None:
            return SparseTensor.on(x.voxels, *self._fused(x.features, slope))
        else:
            normalized = x.replace(super().forward(x.features))
        return normalized if act is None else act(normalized)

    def _fused(self, features: Tensor, slope: float | Tensor) -> tuple[Tensor, Recompute | None]:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        running = (self.running_mean, self.running_var)
        of_batch = self.training or self.running_mean is None
        return norm_act(features, self.weight, self.bias, running, of_batch, momentum, self.eps, slope)

    def _without_variance(self, features: Tensor) -> Tensor:
        if self.running_mean is None or self.running_var is None:
            return _affine(features - features, self.weight, self.bias)
        scale = (self.running_var + self.eps).rsqrt()
        return _affine((features - self.running_mean) * scale, self.weight, self.bias)


class SparseInstanceNorm3d(nn.InstanceNorm3d):
    """Instance norm: every channel of every batch item over that item's active voxels.

    Arguments and ``state_dict`` of ``torch.nn.InstanceNorm3d`` without running statistics: with
    ``track_running_stats=True`` a call raises ValueError. (N, C) to (N, C). An item with one active voxel has no
    variance; its normalized value is zero.

    Examples:
        >>> where = torch.tensor([[0, 1, 2, 3], [0, 3, 2, 1], [1, 0, 0, 0]])  # two volumes
        >>> x = SparseTensor(torch.tensor([[1.0], [3.0], [9.0]]), where, (4, 4, 4))
        >>> SparseInstanceNorm3d(1)(x).features.flatten().round().tolist()
        [-1.0, 1.0, 0.0]
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # rows (N, C) instead of a volume

    def forward(self, x: SparseTensor, act: nn.Module | None = None) -> SparseTensor:
        """Normalize (N, C) features, and apply ``act`` if one is given; see :class:`SparseBatchNorm3d`."""
        if self.track_running_stats:
            raise ValueError("SparseInstanceNorm3d keeps no running statistics; set track_running_stats=False.")
        items, slope = _per_item(x), slope_below_zero(act)
        if slope is not None and min(len(features) for features in items) > 1:
            return SparseTensor.on(x.voxels, *_joined([self._fused(features, slope) for features in items]))
        normalized = x.replace(torch.cat([self._normalize(features) for features in items]))
        return normalized if act is None else act(normalized)

    def _fused(self, features: Tensor, slope: float | Tensor) -> tuple[Tensor, Recompute | None]:
        return norm_act(features, self.weight, self.bias, (None, None), True, 0.0, self.eps, slope)

    def _normalize(self, features: Tensor) -> Tensor:
        if len(features) < 2:
            return _affine(features - features, self.weight, self.bias)
        return functional.batch_norm(features, None, None, self.weight, self.bias, True, 0.0, self.eps)


class SparseGroupNorm(nn.GroupNorm):
    """Group norm: groups of channels of every batch item over that item's active voxels, as ``torch.nn.GroupNorm``.

    (N, C) to (N, C). A group of one channel has no variance in an item with one active voxel; its normalized value is
    zero.

    Examples:
        >>> x = SparseTensor(torch.tensor([[1.0, 3.0]]), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> SparseGroupNorm(1, 2)(x).features.flatten().round().tolist()
        [-1.0, 1.0]
    """

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Normalize (N, C) features."""
        return x.replace(torch.cat([self._normalize(features) for features in _per_item(x)]))

    def _normalize(self, features: Tensor) -> Tensor:
        if len(features) * (self.num_channels // self.num_groups) < 2:
            return _affine(features - features, self.weight, self.bias)
        return super().forward(features.t()[None])[0].t() if len(features) else features


def _per_item(x: SparseTensor) -> list[Tensor]:
    bounds = x.voxels.batch_bounds()
    return [x.features[start:stop] for start, stop in pairwise(bounds)]


def _joined(items: list[tuple[Tensor, Recompute | None]]) -> tuple[Tensor, Recompute | None]:
    """The rows of all items, and how to compute them again."""
    if len(items) == 1:
        return items[0]
    recomputes = [recompute for _, recompute in items if recompute is not None]
    joined = torch.cat([features for features, _ in items])
    return joined, None if len(recomputes) < len(items) else lambda: torch.cat(
        [recompute() for recompute in recomputes]
    )


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normalized = normalized * weight
    return normalized if bias is None else normalized + bias


class _SparsePool3d(nn.Module):
    """Pooling over the active voxels of each window; a result stands at floor(c / stride) of the active voxels.

    The window of output o starts at ``stride * o - padding``, with ``padding = (kernel_size - 1) // 2`` where windows
    overlap and none where they do not (torch's own default). A window that reaches past the volume's end counts what is
    in it, where torch leaves it out: an axis of n voxels has ceil(n / stride) results. A window without any active
    voxel, which a kernel smaller than its stride can leave, gives zero.
    """

    reduction: str

    @numbers_checked
    def __init__(self, kernel_size: Size = 2, stride: Size | None = None) -> None:
        """Args: kernel_size and stride, one number or one per axis; the stride defaults to the kernel size."""
        super().__init__()
        self.kernel_size = steps(kernel_size)
        self.stride = steps(kernel_size if stride is None else stride)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Pool (N, C) features to (M, C)."""
        sizes = zip(self.kernel_size, self.stride, strict=True)
        i, j, k = ((size - 1) // 2 if size > step else 0 for size, step in sizes)
        outputs = x.voxels if self.stride == (1, 1, 1) else x.voxels.coarsened(self.stride)
        shape = KernelShape(self.kernel_size, self.stride, padding=(i, j, k))
        pairs = list(kernel_map_between(x.voxels, outputs, shape).each_pair())
        in_rows, out_rows = (torch.cat(rows).long() for rows in zip(*pairs, strict=True))
        pooled = x.features.new_zeros(len(outputs), x.features.shape[1])
        target_rows = out_rows[:, None].expand(-1, x.features.shape[1])
        pooled = pooled.scatter_reduce(0, target_rows, x.features[in_rows], self.reduction, include_self=False)
        return SparseTensor.on(outputs, pooled)


class SparseMaxPool3d(_SparsePool3d):
    """Maximum over the active voxels of each window (inactive ones do not count as zero).

    Equals ``torch.nn.MaxPool3d(kernel_size, stride)`` on a volume filled with -inf, with padding ``(kernel_size - 1) //
    2`` if ``kernel_size > stride``; but an axis of n voxels has ceil(n / stride) results, as a window that reaches past
    the end counts what is in it. Where several voxels tie for the maximum they share the gradient.

    Args:
        kernel_size: edge of a window in voxels, one number or one per axis.
        stride: step from window to window; the default is the kernel size.

    Shape: SparseTensor (N, C) on (H, W, D) -> SparseTensor (M, C) on (ceil(H / stride), ...), M <= N.

    Examples:
        >>> x = SparseTensor(torch.ones(2, 8), torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]]), (32, 32, 16))
        >>> SparseMaxPool3d(2)(x).spatial_shape
        (16, 16, 8)
    """

    reduction = "amax"


class SparseAvgPool3d(_SparsePool3d):
    """Mean over the active voxels of each window (inactive ones do not count); arguments as :class:`SparseMaxPool3d`.

    Examples:
        >>> x = SparseTensor(torch.tensor([[1.0], [3.0]]), torch.tensor([[0, 2, 2, 2], [0, 2, 3, 3]]), (4, 4, 4))
        >>> SparseAvgPool3d(2)(x).features  # of the one window with active voxels
        tensor([[2.]])
    """

    reduction = "mean"


class SparseGlobalAvgPool3d(nn.Module):
    """Mean over all active voxels of each batch item: SparseTensor (N, C) -> Tensor (B, C); zero for an empty item.

    Examples:
        >>> x = SparseTensor(torch.tensor([[1.0], [3.0]]), torch.tensor([[0, 2, 2, 2], [0, 1, 3, 3]]), (4, 4, 4))
        >>> SparseGlobalAvgPool3d()(x)
        tensor([[2.]])
    """

    def forward(self, x: SparseTensor) -> Tensor:
        """Pool (see the class)."""
        return torch.stack([rows.mean(0) if len(rows) else rows.sum(0) for rows in _per_item(x)])

"""SparseTensor: feature rows on a set of active voxels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.checks import check_finite, computable, plain
from monai_memeff.geometry import key_lists, voxels
from monai_memeff.sparse.core.checks import check_batch_index, check_inside, check_rows
from monai_memeff.sparse.core.fused import Recompute
from monai_memeff.sparse.core.voxel_set import VoxelSet


class SparseTensor:
    """Features on the active voxels of a batch of volumes.

    Rows are kept in lexicographic order of (batch, i, j, k); a constructor call with rows in another order sorts them.
    Coordinates count voxels of this tensor's own level: after a convolution of stride 2 they run to half the extent.

    Args:
        features: (N, C) floating point.
        coordinates: (N, 4) integers [batch, i, j, k], unique; i, j, k follow the axes (H, W, D) of the volume.
        spatial_shape: (H, W, D) of this level, each at most 2^18.
        stride: voxel size of this level in voxels of the finest one, an integer or one per axis.
        batch_size: number of volumes; by default one more than the largest batch index (1 without voxels).

    Raises:
        ValueError: shapes or dtypes do not fit, a coordinate lies outside the grid, two rows share one voxel, or a
            feature is NaN or infinite.

    Examples:
        >>> SparseTensor(torch.ones(1, 8), torch.tensor([[0, 1, 2, 3]]), (32, 32, 16)).dense().shape
        torch.Size([1, 8, 32, 32, 16])
    """

    def __init__(
        self,
        features: Tensor,
        coordinates: Tensor,
        spatial_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        batch_size: int | None = None,
    ) -> None:
        features, coordinates = _plain(features), _plain(coordinates)
        check_rows(features, coordinates)
        check_batch_index(coordinates)
        if batch_size is None:
            batch_size = int(coordinates[:, 0].max()) + 1 if len(coordinates) else 1
        voxels.check_extent(spatial_shape, batch_size)
        check_inside(coordinates, spatial_shape, batch_size)
        keys = voxels.coordinates_to_keys(coordinates.to(features.device), spatial_shape)
        if not key_lists.is_strictly_increasing(keys):
            keys, order = keys.sort()
            features = features[order]
            if not key_lists.is_strictly_increasing(keys):
                raise ValueError("coordinates must be unique, got at least two rows for one voxel; merge them first.")
        strides = (stride,) * 3 if isinstance(stride, int) else tuple(stride)
        self.features = features
        self.voxels = VoxelSet(keys, spatial_shape, batch_size, strides)
        self.recompute: Recompute | None = None

    @classmethod
    def on(cls, voxel_set: VoxelSet, features: Tensor, recompute: Recompute | None = None) -> SparseTensor:
        """Features (N, C) on an existing voxel set, whose plans are shared.

        ``recompute`` computes the same features once more, for graphs to keep in their place where that is cheaper.
        """
        tensor = cls.__new__(cls)
        tensor.features, tensor.voxels, tensor.recompute = _plain(features), voxel_set, recompute
        return tensor

    @classmethod
    def from_dense(cls, image: Tensor, mask: Tensor) -> SparseTensor:
        """Take the voxels of a dense volume that a mask marks; differentiable in ``image``.

        Args:
            image: (B, C, H, W, D).
            mask: (B, 1, H, W, D) boolean.

        Raises:
            ValueError: the shapes do not fit, the mask is not boolean, or an active voxel is NaN or infinite.
        """
        image, mask = plain(image), plain(mask)  # MONAI's metadata does not travel along
        if image.ndim != 5:
            raise ValueError(f"image must have shape (B, C, H, W, D), got {tuple(image.shape)}; add the missing axes.")
        expected = (image.shape[0], 1, *image.shape[2:])
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(
                f"mask must be boolean of shape {expected}, got {mask.dtype} of {tuple(mask.shape)}; "
                "compare the image with a threshold, as in (image > 0).any(1, keepdim=True)."
            )
        voxels.check_extent(image.shape[2:], image.shape[0])
        voxel_set = VoxelSet(mask.flatten().nonzero()[:, 0], image.shape[2:], image.shape[0])
        batch, position = _batch_and_position(voxel_set)
        features = image.flatten(2)[batch, :, position]
        check_finite(features, "SparseTensor")
        return cls.on(voxel_set, features)

    def dense(self, fill: float | Sequence[float] = 0.0) -> Tensor:
        """The volume (B, C, H, W, D); differentiable in the features.

        Args:
            fill: value of the voxels that are not active, one number or one per channel.
        """
        batch, position = _batch_and_position(self.voxels)
        shape = self.spatial_shape
        cells = shape[0] * shape[1] * shape[2]
        filling = torch.as_tensor(fill, dtype=self.features.dtype, device=self.features.device).view(1, -1, 1)
        volume = filling.expand(self.batch_size, self.features.shape[1], cells).clone()
        volume[batch, :, position] = self.features
        return volume.view(self.batch_size, -1, *shape)

    def replace(self, features: Tensor) -> SparseTensor:
        """Other features (N, C') on the same voxels."""
        return SparseTensor.on(self.voxels, features)

    def prune(self, keep: Tensor) -> SparseTensor:
        """The voxels that ``keep``, (N,) boolean, marks; ValueError where it is anything else."""
        if keep.dtype != torch.bool or keep.shape != (len(self),):
            found = f"{keep.dtype} of {tuple(keep.shape)}; give one value per voxel, as in x.features[:, 0] > 0."
            raise ValueError(f"keep must be boolean of shape ({len(self)},), got {found}")
        rows = keep.nonzero().view(-1)
        return SparseTensor.on(self.voxels.select(rows), self.features.index_select(0, rows))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SparseTensor:
        """Features and voxels on another device, or features in another dtype."""
        features = self.features.to(device=device, dtype=dtype)
        if features.device == self.voxels.device:
            return self.replace(features)
        return SparseTensor.on(self.voxels.to(features.device), features)

    @property
    def coordinates(self) -> Tensor:
        """(N, 4) int64 [batch, i, j, k] in voxels of this level."""
        return self.voxels.coordinates

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """(H, W, D) of this level."""
        return self.voxels.spatial_shape

    @property
    def stride(self) -> tuple[int, int, int]:
        """Voxel size of this level in voxels of the finest one."""
        return self.voxels.stride

    @property
    def batch_size(self) -> int:
        """Number of volumes."""
        return self.voxels.batch_size

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.features.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features."""
        return self.features.dtype

    @property
    def occupancy(self) -> float:
        """Active voxels as a fraction of the grid."""
        height, width, depth = self.spatial_shape
        return len(self) / (self.batch_size * height * width * depth)

    def __len__(self) -> int:
        return self.features.shape[0]

    def __add__(self, other: SparseTensor) -> SparseTensor:
        return union_add(self, other)

    def __repr__(self) -> str:
        return (
            f"SparseTensor({len(self)} voxels x {self.features.shape[1]} channels, spatial_shape={self.spatial_shape}, "
            f"stride={self.stride}, batch_size={self.batch_size}, dtype={self.dtype}, device={self.device})"
        )


def _plain(rows: Tensor) -> Tensor:
    """Rows without MONAI's metadata, which describes volumes; others stay the same object, a leaf of a graph say."""
    return rows.as_tensor() if isinstance(rows, MetaTensor) else rows


def nonzero_voxels(volume: SparseTensor | Tensor) -> SparseTensor:
    """The non-zero voxels of a dense (B, 1, H, W, D) volume as a SparseTensor; a SparseTensor passes unchanged.

    Raises:
        ValueError: the volume is not 5-dimensional with one channel, or holds NaN or infinity.
    """
    if isinstance(volume, SparseTensor):
        return volume
    if volume.ndim != 5 or volume.shape[1] != 1:
        raise ValueError(
            f"a binary volume must have shape (B, 1, H, W, D), got {tuple(volume.shape)}; add the missing axes or take "
            "one channel."
        )
    check_finite(volume, "a binary volume")
    volume = computable(volume)
    found = SparseTensor.from_dense(volume, volume != 0)
    return found if found.features.is_floating_point() else found.replace(found.features.float())


def union_add(first: SparseTensor, second: SparseTensor) -> SparseTensor:
    """Sum over the union of two voxel sets, ``first + second``; a voxel that one of them lacks counts as zero there.

    Raises:
        ValueError: the grids or the channel counts differ.

    Examples:
        >>> first = SparseTensor(torch.ones(1, 8), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> union_add(first, SparseTensor(torch.ones(1, 8), torch.tensor([[0, 3, 2, 1]]), (4, 4, 4))).features.shape
        torch.Size([2, 8])
    """
    if first.features.shape[1] != second.features.shape[1]:
        raise ValueError(
            f"union_add needs equal channels, got {first.features.shape[1]} and {second.features.shape[1]}; "
            "use concatenate_channels, or a 1^3 convolution before."
        )
    if _same_voxels(first, second):
        return first.replace(first.features + second.features)
    union, first_rows, second_rows = _unite(first, second)
    return SparseTensor.on(union, _Sum.apply(first.features, second.features, first_rows, second_rows, len(union)))


class _Sum(torch.autograd.Function):
    """Rows of two matrices added at their places; the graph keeps the places as int32."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, first_rows: Tensor, second_rows: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(first_rows, second_rows)
        ctx.dtypes = first.dtype, second.dtype
        total = first.new_zeros(rows, first.shape[1], dtype=torch.promote_types(first.dtype, second.dtype))
        total.index_copy_(0, first_rows.long(), first.to(total.dtype))
        return total.index_add_(0, second_rows.long(), second.to(total.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            grad.index_select(0, rows).to(dtype) if need else None
            for rows, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return *found, None, None, None


def concatenate_channels(tensors: Sequence[SparseTensor]) -> SparseTensor:
    """Stack the channels over the union of the voxel sets, in the given order; absent voxels count as zero.

    Raises:
        ValueError: no tensor is given, or the grids differ.

    Examples:
        >>> x = SparseTensor(torch.ones(1, 8), torch.tensor([[0, 1, 2, 3]]), (4, 4, 4))
        >>> concatenate_channels([x, x]).features.shape
        torch.Size([1, 16])
    """
    if not tensors:
        raise ValueError("concatenate_channels needs at least one SparseTensor, got none; pass a list of them.")
    return reduce(_concatenate_two, tensors)


def _concatenate_two(first: SparseTensor, second: SparseTensor) -> SparseTensor:
    if _same_voxels(first, second):
        return first.replace(torch.cat((first.features, second.features), dim=1))
    union, first_rows, second_rows = _unite(first, second)
    columns = [
        tensor.features.new_zeros(len(union), tensor.features.shape[1]).index_copy(0, rows.long(), tensor.features)
        for tensor, rows in ((first, first_rows), (second, second_rows))
    ]
    return SparseTensor.on(union, torch.cat(columns, dim=1))


def _same_voxels(first: SparseTensor, second: SparseTensor) -> bool:
    if not first.voxels.same_grid(second.voxels):
        raise ValueError(
            "sparse tensors must share one grid, got "
            f"{(first.spatial_shape, first.stride, first.batch_size)} and "
            f"{(second.spatial_shape, second.stride, second.batch_size)} as (spatial_shape, stride, batch_size); "
            "bring them to one level first."
        )
    return first.voxels is second.voxels or torch.equal(first.voxels.keys, second.voxels.keys)


def _unite(first: SparseTensor, second: SparseTensor) -> tuple[VoxelSet, Tensor, Tensor]:
    keys, first_rows, second_rows = key_lists.unite(first.voxels.keys, second.voxels.keys, first.voxels.cells)
    return first.voxels.with_keys(keys), first_rows, second_rows


def _batch_and_position(voxel_set: VoxelSet) -> tuple[Tensor, Tensor]:
    cells = voxel_set.cells // voxel_set.batch_size
    batch = voxel_set.keys.div(cells, rounding_mode="floor")
    return batch, voxel_set.keys - batch * cells

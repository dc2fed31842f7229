"""Plain references for sparse networks: dense volumes with zeros, dictionaries of voxels, sets in plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from monai_memeff.sparse import SparseConv3d, SparseConvTranspose3d, SparseTensor
from monai_memeff.sparse.core.voxel_set import VoxelSet
from tests.oracles import assert_same_as_dense, asymmetric, fill_asymmetric

Size = int | tuple[int, int, int]
Voxel = tuple[int, int, int, int]


def triple(value: Size) -> tuple[int, int, int]:
    """One number or three as three."""
    return (value, value, value) if isinstance(value, int) else value


def random_mask(batch: int, shape: Sequence[int], occupancy: float, empty_item: int | None = None) -> Tensor:
    """(B, 1, H, W, D) boolean with about this share of active voxels, and one item without any if wanted."""
    mask = torch.rand(batch, 1, *shape) < occupancy
    if empty_item is not None:
        mask[empty_item] = False
    return mask


def mask_of(voxels: SparseTensor | VoxelSet) -> Tensor:
    """(B, 1, H, W, D) boolean: the active voxels of a sparse tensor or voxel set."""
    mask = torch.zeros(voxels.batch_size, 1, *voxels.spatial_shape, dtype=torch.bool)
    batch, i, j, k = voxels.coordinates.unbind(1)
    mask[batch, 0, i, j, k] = True
    return mask


def set_of(voxels: SparseTensor | VoxelSet) -> set[Voxel]:
    """The active voxels as Python tuples (batch, i, j, k)."""
    return {tuple(row) for row in voxels.coordinates.tolist()}


def fine_and_coarse(mask: Tensor, stride: Size) -> tuple[VoxelSet, VoxelSet]:
    """The voxel set of a mask, and the set coarsened from it."""
    fine = SparseTensor.from_dense(torch.zeros(len(mask), 1, *mask.shape[2:]), mask).voxels
    return fine, fine.coarsened(triple(stride))


def shuffled_rows(x: SparseTensor) -> SparseTensor:
    """The same tensor, built from its rows in random order."""
    order = torch.randperm(len(x))
    return SparseTensor(x.features[order], x.coordinates[order], x.spatial_shape, x.stride, x.batch_size)


def _fitted(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """Cut the end of every axis, or fill it with zeros."""
    missing = [max(0, want - have) for want, have in zip(shape, volume.shape[2:], strict=True)]
    padded = functional.pad(volume, [amount for extent in reversed(missing) for amount in (0, extent)])
    return padded[..., : shape[0], : shape[1], : shape[2]]


class DenseConv(nn.Conv3d):
    """Dense twin of ``SparseConv3d``, on a zero-filled volume, at ceil(extent / stride) places."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Size, stride: Size = 1, dilation: Size = 1) -> None:
        padding = tuple(d * (k - 1) // 2 for k, d in zip(triple(kernel), triple(dilation), strict=True))
        super().__init__(in_channels, out_channels, kernel, stride, padding, dilation)
        fill_asymmetric(self.double())

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        shape = [-(-extent // step) for extent, step in zip(x.shape[2:], self.stride, strict=True)]
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        room = [s * (n - 1) + span for n, s, span in zip(shape, self.stride, spans, strict=True)]
        padded = functional.pad(x, [p for padding in reversed(self.padding) for p in (padding, 0)])
        return functional.conv3d(_fitted(padded, room), self.weight, self.bias, self.stride, 0, self.dilation)


class DenseConvTranspose(nn.ConvTranspose3d):
    """Dense twin of ``SparseConvTranspose3d``, on a zero-filled volume, cut or filled to a given shape."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        stride: Size = 2,
        dilation: Size = 1,
        padding: Size | None = None,
    ) -> None:
        if padding is None:
            padding = tuple(d * (k - 1) // 2 for k, d in zip(triple(kernel), triple(dilation), strict=True))
        super().__init__(in_channels, out_channels, kernel, stride, padding, dilation=dilation)
        fill_asymmetric(self.double())

    def onto(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Convolve to (B, C, *shape)."""
        i, j, k = self.padding
        spread = functional.conv_transpose3d(x, self.weight, None, self.stride, dilation=self.dilation)
        return _fitted(spread[:, :, i:, j:, k:], shape) + self.bias.view(1, -1, 1, 1, 1)

    def reach(self, mask: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, 1, *shape) boolean: where anything arrives."""
        ones = torch.ones(1, 1, *self.kernel_size)
        i, j, k = self.padding
        spread = functional.conv_transpose3d(mask.float(), ones, None, self.stride, dilation=self.dilation)
        return _fitted(spread[:, :, i:, j:, k:], shape) > 0


def convolve_by_dictionary(
    values: dict[Voxel, Tensor],
    outputs: Iterable[Voxel],
    weight: Tensor,
    bias: Tensor,
    stride: Size = 1,
    dilation: Size = 1,
) -> dict[Voxel, Tensor]:
    """Voxel by voxel: out[o] = bias + sum over t of weight[:, :, t] @ in[stride * o - padding + dilation * t]."""
    strides, dilations = triple(stride), triple(dilation)
    sizes = weight.shape[2:]
    padding = [d * (k - 1) // 2 for k, d in zip(sizes, dilations, strict=True)]
    found = {}
    for batch, *place in outputs:
        total = bias.clone()
        for tap in product(*map(range, sizes)):
            source = (s * o - p + d * t for o, s, p, d, t in zip(place, strides, padding, dilations, tap, strict=True))
            value = values.get((batch, *source))
            if value is not None:
                total = total + weight[(slice(None), slice(None), *tap)] @ value
        found[(batch, *place)] = total
    return found


def generated_by_sets(coarse: set[Voxel], kernel: int, shape: Sequence[int]) -> set[Voxel]:
    """What a generative kernel without padding reaches at stride 2: 2 c + t, inside the volume."""
    reached = {
        (b, 2 * i + x, 2 * j + y, 2 * k + z) for b, i, j, k in coarse for x, y, z in product(range(kernel), repeat=3)
    }
    return {voxel for voxel in reached if all(c < extent for c, extent in zip(voxel[1:], shape, strict=True))}


def floored(voxels: set[Voxel], stride: int) -> set[Voxel]:
    """floor(c / stride) of every voxel."""
    return {(b, i // stride, j // stride, k // stride) for b, i, j, k in voxels}


def assert_convolution_is_dense(sparse: SparseConv3d, dense: DenseConv, mask: Tensor) -> None:
    """Outputs and gradients of a sparse convolution on the voxels of a mask equal the dense one's."""
    fine, coarse = fine_and_coarse(mask, dense.stride)
    assert_same_as_dense(
        lambda x: sparse(SparseTensor.from_dense(x, mask)).dense(),
        lambda x: dense(x * mask),
        asymmetric((len(mask), dense.in_channels, *mask.shape[2:])),
        modules=(sparse, dense),
        where=mask_of(fine if dense.stride == (1, 1, 1) else coarse),
    )


def assert_transposed_is_dense(
    sparse: SparseConvTranspose3d, dense: DenseConvTranspose, mask: Tensor, target: Tensor | None = None
) -> None:
    """The same for a transposed one, from the coarsened mask back onto the mask, or onto a given target."""
    fine, coarse = fine_and_coarse(mask, dense.stride)
    coarse = fine if dense.stride == (1, 1, 1) else coarse
    active, shape = mask_of(coarse), fine.spatial_shape
    goal = None if target is None else SparseTensor.from_dense(torch.zeros(len(mask), 1, *shape), target)
    assert_same_as_dense(
        lambda x: sparse(SparseTensor.on(coarse, SparseTensor.from_dense(x, active).features), goal).dense(),
        lambda x: dense.onto(x * active, shape),
        asymmetric((len(mask), dense.in_channels, *coarse.spatial_shape)),
        modules=(sparse, dense),
        where=mask if target is None else target,
    )


def assert_generative_is_dense(sparse: SparseConvTranspose3d, dense: DenseConvTranspose, mask: Tensor) -> None:
    """The same for a generative one; its voxels are exactly those that the kernel reaches."""
    shape = tuple(extent * step for extent, step in zip(mask.shape[2:], dense.stride, strict=True))
    image, reached = asymmetric((len(mask), dense.in_channels, *mask.shape[2:])), dense.reach(mask, shape)
    assert torch.equal(mask_of(sparse(SparseTensor.from_dense(image, mask))), reached)
    assert_same_as_dense(
        lambda x: sparse(SparseTensor.from_dense(x, mask)).dense(),
        lambda x: dense.onto(x * mask, shape),
        image,
        modules=(sparse, dense),
        where=reached,
    )

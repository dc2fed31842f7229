"""Sparse wing: compute only where there is something."""

from monai_memeff.sparse import backends
from monai_memeff.sparse.activity import active_voxels
from monai_memeff.sparse.blocks import (
    SparseAvgPool3d,
    SparseBatchNorm3d,
    SparseDropout3d,
    SparseGlobalAvgPool3d,
    SparseGroupNorm,
    SparseInstanceNorm3d,
    SparseLeakyReLU,
    SparseMaxPool3d,
    SparsePReLU,
    SparseReLU,
)
from monai_memeff.sparse.conv import SparseConv3d, SparseConvTranspose3d
from monai_memeff.sparse.convert import to_sparse
from monai_memeff.sparse.loss import SparseCompletionLoss
from monai_memeff.sparse.network import SparseCompletionNet, SparseUNet
from monai_memeff.sparse.tensor import SparseTensor, concatenate, union_add

__all__ = [
    "SparseAvgPool3d",
    "SparseBatchNorm3d",
    "SparseCompletionLoss",
    "SparseCompletionNet",
    "SparseConv3d",
    "SparseConvTranspose3d",
    "SparseDropout3d",
    "SparseGlobalAvgPool3d",
    "SparseGroupNorm",
    "SparseInstanceNorm3d",
    "SparseLeakyReLU",
    "SparseMaxPool3d",
    "SparsePReLU",
    "SparseReLU",
    "SparseTensor",
    "SparseUNet",
    "active_voxels",
    "backends",
    "concatenate",
    "to_sparse",
    "union_add",
]

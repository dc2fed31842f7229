"""Sparse: compute only where there is something."""

from monai_memeff.sparse import backends
from monai_memeff.sparse.core.activity import active_voxels
from monai_memeff.sparse.core.map_cache import (
    keep_kernel_maps,
)
from monai_memeff.sparse.core.tensor import SparseTensor, concatenate_channels, union_add
from monai_memeff.sparse.engine import PrepareBatchSparse
from monai_memeff.sparse.inferer import SparseInferer
from monai_memeff.sparse.loss import SparseCompletionLoss
from monai_memeff.sparse.networks.coarse_to_sparse import CoarseToSparseUNet
from monai_memeff.sparse.networks.completion import SparseCompletionNet
from monai_memeff.sparse.networks.unet import SparseUNet
from monai_memeff.sparse.nn.activations import (
    SparseDropout,
    SparseDropout3d,
    SparseELU,
    SparseGELU,
    SparseLeakyReLU,
    SparsePReLU,
    SparseReLU,
    SparseSigmoid,
    SparseSiLU,
    SparseTanh,
)
from monai_memeff.sparse.nn.blocks import (
    SparseAvgPool3d,
    SparseBatchNorm3d,
    SparseGlobalAvgPool3d,
    SparseGroupNorm,
    SparseInstanceNorm3d,
    SparseMaxPool3d,
)
from monai_memeff.sparse.nn.conv import SparseConv3d, SparseConvTranspose3d
from monai_memeff.sparse.nn.convert import to_sparse
from monai_memeff.sparse.transforms.coordinates import (
    SparseCollate,
    SparseCoordinates,
    SparseCoordinatesD,
    SparseCoordinatesd,
    SparseCoordinatesDict,
    sparse_collate,
)
from monai_memeff.sparse.transforms.downsample_mask import (
    DownsampleMask,
    DownsampleMaskD,
    DownsampleMaskd,
    DownsampleMaskDict,
)
from monai_memeff.sparse.transforms.resample_to_grid import (
    ResampleToGrid,
    ResampleToGridD,
    ResampleToGridd,
    ResampleToGridDict,
)
from monai_memeff.sparse.transforms.segmentation_errors import (
    RandSegmentationErrors,
    RandSegmentationErrorsD,
    RandSegmentationErrorsd,
    RandSegmentationErrorsDict,
)
from monai_memeff.sparse.transforms.threshold_at_spacing import (
    ThresholdAtSpacing,
    ThresholdAtSpacingD,
    ThresholdAtSpacingd,
    ThresholdAtSpacingDict,
)
from monai_memeff.sparse.transforms.voxel_dropout import (
    RandVoxelDropout,
    RandVoxelDropoutD,
    RandVoxelDropoutd,
    RandVoxelDropoutDict,
)

__all__ = [
    "CoarseToSparseUNet",
    "DownsampleMask",
    "DownsampleMaskD",
    "DownsampleMaskDict",
    "DownsampleMaskd",
    "PrepareBatchSparse",
    "RandSegmentationErrors",
    "RandSegmentationErrorsD",
    "RandSegmentationErrorsDict",
    "RandSegmentationErrorsd",
    "RandVoxelDropout",
    "RandVoxelDropoutD",
    "RandVoxelDropoutDict",
    "RandVoxelDropoutd",
    "ResampleToGrid",
    "ResampleToGridD",
    "ResampleToGridDict",
    "ResampleToGridd",
    "SparseAvgPool3d",
    "SparseBatchNorm3d",
    "SparseCollate",
    "SparseCompletionLoss",
    "SparseCompletionNet",
    "SparseConv3d",
    "SparseConvTranspose3d",
    "SparseCoordinates",
    "SparseCoordinatesD",
    "SparseCoordinatesDict",
    "SparseCoordinatesd",
    "SparseDropout",
    "SparseDropout3d",
    "SparseELU",
    "SparseGELU",
    "SparseGlobalAvgPool3d",
    "SparseGroupNorm",
    "SparseInferer",
    "SparseInstanceNorm3d",
    "SparseLeakyReLU",
    "SparseMaxPool3d",
    "SparsePReLU",
    "SparseReLU",
    "SparseSiLU",
    "SparseSigmoid",
    "SparseTanh",
    "SparseTensor",
    "SparseUNet",
    "ThresholdAtSpacing",
    "ThresholdAtSpacingD",
    "ThresholdAtSpacingDict",
    "ThresholdAtSpacingd",
    "active_voxels",
    "backends",
    "concatenate_channels",
    "keep_kernel_maps",
    "sparse_collate",
    "to_sparse",
    "union_add",
]

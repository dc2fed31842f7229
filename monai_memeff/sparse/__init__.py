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
from monai_memeff.sparse.bone_spacing import BoneSpacing, BoneSpacingD, BoneSpacingd, BoneSpacingDict
from monai_memeff.sparse.coarse_noise import (
    RandCoarseNoise,
    RandCoarseNoiseD,
    RandCoarseNoised,
    RandCoarseNoiseDict,
)
from monai_memeff.sparse.coarse_to_sparse import CoarseToSparseUNet
from monai_memeff.sparse.conv import SparseConv3d, SparseConvTranspose3d
from monai_memeff.sparse.convert import to_sparse
from monai_memeff.sparse.defects import RandSkullDefect, RandSkullDefectD, RandSkullDefectd, RandSkullDefectDict
from monai_memeff.sparse.engine import PrepareBatchSparse
from monai_memeff.sparse.implant import (
    ImplantFromCompletion,
    ImplantFromCompletionD,
    ImplantFromCompletiond,
    ImplantFromCompletionDict,
)
from monai_memeff.sparse.inferer import SparseInferer
from monai_memeff.sparse.loss import SparseCompletionLoss
from monai_memeff.sparse.map_cache import (
    keep_kernel_maps,
)
from monai_memeff.sparse.metrics import ImplantMetric
from monai_memeff.sparse.network import SparseCompletionNet, SparseUNet
from monai_memeff.sparse.pepper import (
    RandPepper,
    RandPepperD,
    RandPepperd,
    RandPepperDict,
)
from monai_memeff.sparse.preparation import (
    SkullShell,
    SkullShellD,
    SkullShelld,
    SkullShellDict,
    UpperSkullCrop,
    UpperSkullCropD,
    UpperSkullCropd,
    UpperSkullCropDict,
)
from monai_memeff.sparse.superresolution import (
    CoarsenMask,
    CoarsenMaskD,
    CoarsenMaskd,
    CoarsenMaskDict,
    PlaceCoarse,
    PlaceCoarseD,
    PlaceCoarsed,
    PlaceCoarseDict,
)
from monai_memeff.sparse.tensor import SparseTensor, concatenate_channels, union_add
from monai_memeff.sparse.transforms import (
    SparseCollate,
    SparseCoordinates,
    SparseCoordinatesD,
    SparseCoordinatesd,
    SparseCoordinatesDict,
    sparse_collate,
)

__all__ = [
    "BoneSpacing",
    "BoneSpacingD",
    "BoneSpacingDict",
    "BoneSpacingd",
    "CoarseToSparseUNet",
    "CoarsenMask",
    "CoarsenMaskD",
    "CoarsenMaskDict",
    "CoarsenMaskd",
    "ImplantFromCompletion",
    "ImplantFromCompletionD",
    "ImplantFromCompletionDict",
    "ImplantFromCompletiond",
    "ImplantMetric",
    "PlaceCoarse",
    "PlaceCoarseD",
    "PlaceCoarseDict",
    "PlaceCoarsed",
    "PrepareBatchSparse",
    "RandCoarseNoise",
    "RandCoarseNoiseD",
    "RandCoarseNoiseDict",
    "RandCoarseNoised",
    "RandPepper",
    "RandPepperD",
    "RandPepperDict",
    "RandPepperd",
    "RandSkullDefect",
    "RandSkullDefectD",
    "RandSkullDefectDict",
    "RandSkullDefectd",
    "SkullShell",
    "SkullShellD",
    "SkullShellDict",
    "SkullShelld",
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
    "SparseDropout3d",
    "SparseGlobalAvgPool3d",
    "SparseGroupNorm",
    "SparseInferer",
    "SparseInstanceNorm3d",
    "SparseLeakyReLU",
    "SparseMaxPool3d",
    "SparsePReLU",
    "SparseReLU",
    "SparseTensor",
    "SparseUNet",
    "UpperSkullCrop",
    "UpperSkullCropD",
    "UpperSkullCropDict",
    "UpperSkullCropd",
    "active_voxels",
    "backends",
    "concatenate_channels",
    "keep_kernel_maps",
    "sparse_collate",
    "to_sparse",
    "union_add",
]

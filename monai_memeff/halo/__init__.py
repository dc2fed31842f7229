"""Halo wing: split the volume, share the edges; any CNN over many devices or streamed through one."""

from monai_memeff.halo.communicator import close, init_mesh
from monai_memeff.halo.engine import (
    GatheredNetwork,
    PartitionPrepareBatch,
    launch,
    local_device,
    on_rank_zero,
    parallel,
)
from monai_memeff.halo.inferer import SpatialPartitionInferer, StreamingReport
from monai_memeff.halo.loss import SpatialLoss
from monai_memeff.halo.mesh import HaloMesh, no_mesh, virtual_mesh
from monai_memeff.halo.network import spatial_partition, unpartition
from monai_memeff.halo.proof import verify
from monai_memeff.halo.region import NotPartitionable
from monai_memeff.halo.transforms import PartitionCrop, PartitionCropD, PartitionCropd, PartitionCropDict
from monai_memeff.halo.unet import VolumeUNet
from monai_memeff.halo.virtual import Hub
from monai_memeff.halo.volume import gather, scatter

__all__ = [
    "GatheredNetwork",
    "HaloMesh",
    "Hub",
    "NotPartitionable",
    "PartitionCrop",
    "PartitionCropD",
    "PartitionCropDict",
    "PartitionCropd",
    "PartitionPrepareBatch",
    "SpatialLoss",
    "SpatialPartitionInferer",
    "StreamingReport",
    "VolumeUNet",
    "close",
    "gather",
    "init_mesh",
    "launch",
    "local_device",
    "no_mesh",
    "on_rank_zero",
    "parallel",
    "scatter",
    "spatial_partition",
    "unpartition",
    "verify",
    "virtual_mesh",
]

"""Halo: a network run in parts of the volume with the result of the whole, streamed through one device or over many."""

from monai_memeff.halo.check import verify
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
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.explain import explain
from monai_memeff.halo.planning.plan import Plan, plan
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
    "NotPartitionableError",
    "PartitionCrop",
    "PartitionCropD",
    "PartitionCropDict",
    "PartitionCropd",
    "PartitionPrepareBatch",
    "Plan",
    "SpatialLoss",
    "SpatialPartitionInferer",
    "StreamingReport",
    "VolumeUNet",
    "close",
    "explain",
    "gather",
    "init_mesh",
    "launch",
    "local_device",
    "no_mesh",
    "on_rank_zero",
    "parallel",
    "plan",
    "scatter",
    "spatial_partition",
    "unpartition",
    "verify",
    "virtual_mesh",
]

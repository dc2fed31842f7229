"""Halo: a network run in parts of the volume with the result of the whole, streamed through one device or over many."""

from monai_memeff.halo.check import verify
from monai_memeff.halo.engine import (
    GatheredNetwork,
    PrepareBatchPartition,
    init_from_torchrun,
    local_device,
    on_rank_zero,
    parallelize,
)
from monai_memeff.halo.inferer import SpatialPartitionInferer, StreamingReport
from monai_memeff.halo.loss import SpatialLoss
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.plan import Plan, explain, plan
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.comm.process_group import destroy_mesh, init_mesh
from monai_memeff.halo.run.ranks.comm.transport import PeerLostError
from monai_memeff.halo.run.ranks.partition import spatial_partition, unpartition
from monai_memeff.halo.run.ranks.volume import gather, scatter
from monai_memeff.halo.transforms import PartitionCrop, PartitionCropD, PartitionCropd, PartitionCropDict
from monai_memeff.halo.unet import VolumeUNet

__all__ = [
    "GatheredNetwork",
    "HaloMesh",
    "NotPartitionableError",
    "PartitionCrop",
    "PartitionCropD",
    "PartitionCropDict",
    "PartitionCropd",
    "PeerLostError",
    "Plan",
    "PrepareBatchPartition",
    "SpatialLoss",
    "SpatialPartitionInferer",
    "StreamingReport",
    "VolumeUNet",
    "destroy_mesh",
    "explain",
    "gather",
    "init_from_torchrun",
    "init_mesh",
    "local_device",
    "on_rank_zero",
    "parallelize",
    "plan",
    "scatter",
    "spatial_partition",
    "unpartition",
    "verify",
]

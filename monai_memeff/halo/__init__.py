"""Halo wing: split the volume, share the edges; any CNN over many devices or streamed through one."""

from monai_memeff.halo.communicator import close, init_mesh, no_mesh, virtual_mesh
from monai_memeff.halo.inferer import SpatialPartitionInferer, StreamingReport
from monai_memeff.halo.loss import SpatialLoss
from monai_memeff.halo.network import spatial_partition, unpartition, verify
from monai_memeff.halo.region import NotPartitionable
from monai_memeff.halo.virtual import Hub
from monai_memeff.halo.volume import gather, scatter

__all__ = [
    "Hub",
    "NotPartitionable",
    "SpatialLoss",
    "SpatialPartitionInferer",
    "StreamingReport",
    "close",
    "gather",
    "init_mesh",
    "no_mesh",
    "scatter",
    "spatial_partition",
    "unpartition",
    "verify",
    "virtual_mesh",
]

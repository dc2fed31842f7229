"""Occupancy: query only where the answer changes."""

from monai_memeff.occupancy.engine import PrepareBatchOccupancy
from monai_memeff.occupancy.inferer import OctreeInferer
from monai_memeff.occupancy.loss import OccupancyLoss
from monai_memeff.occupancy.mesh import SurfaceMesh, labels_to_mesh, logits_to_mesh, write_mesh
from monai_memeff.occupancy.metrics import SampledDiceMetric
from monai_memeff.occupancy.network import OccupancyNet
from monai_memeff.occupancy.nn.activation import PadeActivation
from monai_memeff.occupancy.nn.norm import ConditionalBatchNorm
from monai_memeff.occupancy.optimizer import Lookahead, occupancy_optimizer
from monai_memeff.occupancy.report import OctreeReport
from monai_memeff.occupancy.transforms import (
    RandOccupancyPoints,
    RandOccupancyPointsD,
    RandOccupancyPointsd,
    RandOccupancyPointsDict,
)

__all__ = [
    "ConditionalBatchNorm",
    "Lookahead",
    "OccupancyLoss",
    "OccupancyNet",
    "OctreeInferer",
    "OctreeReport",
    "PadeActivation",
    "PrepareBatchOccupancy",
    "RandOccupancyPoints",
    "RandOccupancyPointsD",
    "RandOccupancyPointsDict",
    "RandOccupancyPointsd",
    "SampledDiceMetric",
    "SurfaceMesh",
    "labels_to_mesh",
    "logits_to_mesh",
    "occupancy_optimizer",
    "write_mesh",
]

"""Occupancy wing: ask only where the answer changes."""

from monai_memeff.occupancy.activation import PadeActivation
from monai_memeff.occupancy.network import OccupancyNet

__all__ = ["OccupancyNet", "PadeActivation"]

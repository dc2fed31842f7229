"""Memory: measure and predict the peak of a step, and recompute instead of remember; torch only."""

from monai_memeff.memory.checkpoint import checkpoint
from monai_memeff.memory.estimate import PeakEstimate, estimate_peak
from monai_memeff.memory.forecast import NetworkEstimate
from monai_memeff.memory.meter import PeakMeter, measure_peak
from monai_memeff.memory.network import estimate_network

__all__ = [
    "NetworkEstimate",
    "PeakEstimate",
    "PeakMeter",
    "checkpoint",
    "estimate_network",
    "estimate_peak",
    "measure_peak",
]

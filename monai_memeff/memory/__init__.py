"""Ground room of memory: measure the peak of a step, and recompute instead of remember; torch only."""

from monai_memeff.memory.checkpoint import checkpoint, checkpoint_sequential
from monai_memeff.memory.meter import PeakMeter, measure_peak

__all__ = ["PeakMeter", "checkpoint", "checkpoint_sequential", "measure_peak"]

"""Handlers of MONAI's engines for trainings that may be killed and go on."""

from monai_memeff.handlers.epochs import EpochSeed, ScalerState
from monai_memeff.handlers.saver import AtomicCheckpointSaver

__all__ = ["AtomicCheckpointSaver", "EpochSeed", "ScalerState"]

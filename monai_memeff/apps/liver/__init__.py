"""Livers and their tumors: the loss, scores and synthetic tumors of Hou et al. 2019."""

from monai_memeff.apps.liver.loss import LiverTumorLoss
from monai_memeff.apps.liver.metrics import LesionDiceMetric
from monai_memeff.apps.liver.tumor_synthesis import (
    RandTumorSynthesis,
    RandTumorSynthesisD,
    RandTumorSynthesisd,
    RandTumorSynthesisDict,
)

__all__ = [
    "LesionDiceMetric",
    "LiverTumorLoss",
    "RandTumorSynthesis",
    "RandTumorSynthesisD",
    "RandTumorSynthesisDict",
    "RandTumorSynthesisd",
]

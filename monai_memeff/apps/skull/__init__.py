"""Skulls: synthetic defects, preparation, implants and their scores."""

from monai_memeff.apps.skull.defects import RandSkullDefect, RandSkullDefectD, RandSkullDefectd, RandSkullDefectDict
from monai_memeff.apps.skull.implant import (
    ImplantFromCompletion,
    ImplantFromCompletionD,
    ImplantFromCompletiond,
    ImplantFromCompletionDict,
)
from monai_memeff.apps.skull.implant_metric import ImplantMetric
from monai_memeff.apps.skull.shell import SkullShell, SkullShellD, SkullShelld, SkullShellDict
from monai_memeff.apps.skull.upper_skull import UpperSkullCrop, UpperSkullCropD, UpperSkullCropd, UpperSkullCropDict
from monai_memeff.apps.skull.variation import (
    RandSkullVariation,
    RandSkullVariationD,
    RandSkullVariationd,
    RandSkullVariationDict,
)
from monai_memeff.apps.skull.views import ViewAveragingInferer

__all__ = [
    "ImplantFromCompletion",
    "ImplantFromCompletionD",
    "ImplantFromCompletionDict",
    "ImplantFromCompletiond",
    "ImplantMetric",
    "RandSkullDefect",
    "RandSkullDefectD",
    "RandSkullDefectDict",
    "RandSkullDefectd",
    "RandSkullVariation",
    "RandSkullVariationD",
    "RandSkullVariationDict",
    "RandSkullVariationd",
    "SkullShell",
    "SkullShellD",
    "SkullShellDict",
    "SkullShelld",
    "UpperSkullCrop",
    "UpperSkullCropD",
    "UpperSkullCropDict",
    "UpperSkullCropd",
    "ViewAveragingInferer",
]

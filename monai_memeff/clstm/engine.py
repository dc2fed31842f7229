"""Pieces for MONAI's training engines: the U-Net frozen for a while, as published."""

from __future__ import annotations

from typing import Any

from monai.utils import IgniteInfo, min_version, optional_import
from torch import nn

from monai_memeff.arguments import numbers_checked

Events, _ = optional_import("ignite.engine", IgniteInfo.OPT_IMPORT_VERSION, min_version, "Events")


class FreezeUNetHandler:
    """Fix the weights of a CLSTMUNet's U-Net for the first iterations of a training.

    Van de Leemput et al. 2018, section 3.1: of 1500 iterations on volumes, the first 1000 leave the pre-trained U-Net
    as it is. A training that goes on from a checkpoint counts on from the iteration it had reached. The running
    statistics of batch norm are fixed too, so the frozen U-Net is one and the same function all the while.

    Args:
        network: a CLSTMUNet, bare or inside DistributedDataParallel.
        iterations: Number of iterations; 0 freezes nothing.

    Examples:
        >>> from ignite.engine import Engine
        >>> network = CLSTMUNet(channels=(4, 8))
        >>> trainer = Engine(lambda engine, batch: print(network.unet_frozen))
        >>> FreezeUNetHandler(network, iterations=1).attach(trainer)
        >>> _ = trainer.run(range(2))
        True
        False
    """

    @numbers_checked
    def __init__(self, network: nn.Module, iterations: int = 1000) -> None:
        self.network: Any = getattr(network, "module", network)
        self.iterations = iterations

    def attach(self, engine: Any) -> None:
        """Listen to a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Any) -> None:
        """Freeze or unfreeze, when it changes."""
        frozen = engine.state.iteration <= self.iterations
        if frozen != self.network.unet_frozen:
            self.network.freeze_unet(frozen)

"""What makes a training that goes on the one that nobody interrupted: seeds of epochs, and the state of the scaler."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from monai.data.utils import set_rnd


class EpochSeed:
    """Begin every epoch of a training with a seed of its own, and with the data loader's first batch.

    Order, augmentation and dropout of an epoch then follow from the seed of the run and the number of the epoch, and
    not from the epochs before it: a training that goes on from a checkpoint of its last epoch ends with the same
    weights. The seed of the run is torch's, as ``monai.utils.set_determinism`` sets it, so ranks that have seeds of
    their own keep them.

    Examples:
        >>> from ignite.engine import Engine
        >>> trainer = Engine(lambda engine, batch: float(torch.rand(())))
        >>> EpochSeed().attach(trainer)  # or among a MONAI trainer's handlers
        >>> runs = [torch.manual_seed(7) and trainer.run([0], max_epochs=2).output for _ in range(2)]
        >>> runs[0] == runs[1]
        True
    """

    def __init__(self) -> None:
        self._seed: int | None = None

    def attach(self, engine: Any) -> None:
        """Act whenever an ignite engine begins a run, and each of its epochs."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.EPOCH_STARTED, self._seed_epoch)

    def _begin(self, engine: Any) -> None:
        self._seed = torch.initial_seed()

    def _seed_epoch(self, engine: Any) -> None:
        assert self._seed is not None
        seed = int(np.random.SeedSequence((self._seed, engine.state.epoch)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        loader = engine.state.dataloader
        set_rnd(getattr(loader, "dataset", None), seed)
        engine.set_data(loader)


class ScalerState:
    """The state of a trainer's gradient scaler, for a checkpoint; without mixed precision there is none.

    Args:
        trainer: a MONAI trainer.

    Examples:
        >>> from types import SimpleNamespace
        >>> ScalerState(SimpleNamespace(scaler=None)).state_dict()
        {}
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """What the scaler keeps."""
        scaler = self._trainer.scaler
        return {} if scaler is None else scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; a checkpoint of full precision has nothing for it."""
        if self._trainer.scaler is not None and state:
            self._trainer.scaler.load_state_dict(state)

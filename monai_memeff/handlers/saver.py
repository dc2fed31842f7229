"""AtomicCheckpointSaver: a checkpoint is whole, and the one before it goes only then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.handlers.checkpoint_saver import CheckpointSaver

from monai_memeff.data.atomic import atomic_write


class AtomicCheckpointSaver(CheckpointSaver):
    """MONAI's ``CheckpointSaver`` for trainings that may be killed at any moment.

    That removes the old file first and then writes the new one in its place, so a training that is killed meanwhile
    leaves half a file, or none. Here a file is written under another name and takes its own when it is whole; only then
    do those go that are no longer wanted. As there, the first of several processes writes.

    Examples:
        >>> import os
        >>> from ignite.engine import Engine
        >>> trainer, state = Engine(lambda engine, batch: None), {"model": torch.nn.Linear(2, 1)}
        >>> AtomicCheckpointSaver("checkpoints", state, save_interval=1, n_saved=1).attach(trainer)
        >>> _ = trainer.run([0], max_epochs=3)
        >>> os.listdir("checkpoints")
        ['model_epoch=3.pt']
    """

    def attach(self, engine: Any) -> None:
        """Save at the events that the arguments name."""
        for name in ("_final_checkpoint", "_key_metric_checkpoint", "_interval_checkpoint"):
            checkpoint = getattr(self, name)
            if checkpoint is not None:
                checkpoint.save_handler = _atomic(checkpoint.save_handler)
        super().attach(engine)


def _atomic(handler: Any) -> Any:
    """MONAI's handler of files, with writes that are whole or nothing."""
    from ignite import distributed
    from ignite.handlers.checkpoint import BaseSaveHandler

    class AtomicSaver(BaseSaveHandler):
        """Writes a file, then removes those that were to be removed before."""

        unwanted: set[Path] = set()

        def _path(self, filename: str) -> Path:
            return Path(handler.dirname, handler.filename or filename)

        def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Any = None) -> None:
            if distributed.get_rank() == 0:
                with atomic_write(self._path(filename)) as part:
                    torch.save(checkpoint, part)
                for path in self.unwanted - {self._path(filename)}:
                    path.unlink(missing_ok=True)
            self.unwanted = set()

        def remove(self, filename: str) -> None:
            self.unwanted = {*self.unwanted, self._path(filename)}

    return handler if isinstance(handler, AtomicSaver) else AtomicSaver()

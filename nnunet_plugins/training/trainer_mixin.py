"""What our trainers share: clear words when a split fails or a setting changed, and a hint for receivers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HINT = " (of monai-memeff: pip install 'monai-memeff[nnunet]')"
"""Follows the trainer's name in checkpoints, so that nnU-Net's "could not find trainer" says where to get it."""


class TrainerMixin:
    """Goes before ``nnUNetTrainer`` in a trainer's bases.

    Attributes:
        settings_key: Key of the trainer's settings in a configuration of the plans.
    """

    settings_key: str

    def do_split(self) -> tuple[list[str], list[str]]:
        """Refuse what nnU-Net's five-fold split cannot do with a one-line way out; else as in stock."""
        try:
            return super().do_split()  # type: ignore[misc]
        except ValueError as error:
            fold, cases = self.fold, self.dataset_json.get("numTraining")  # type: ignore[attr-defined]
            raise ValueError(
                f"fold {fold} needs a split, and nnU-Net's has five folds for {cases} training cases: train with fold "
                f"`all`, or write {self.preprocessed_dataset_folder_base}/splits_final.json. ({error})"  # type: ignore[attr-defined]
            ) from error

    def learn_from(self, loss: Tensor, between: Callable[[], None] | None = None) -> dict:
        """Backward, clip and step as in stock; ``between`` runs on the gradients before they are clipped."""
        scaler, optimizer = self.grad_scaler, self.optimizer  # type: ignore[attr-defined]
        (loss if scaler is None else scaler.scale(loss)).backward()
        if between is not None:
            between()
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)  # type: ignore[attr-defined]
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        return {"loss": loss.detach().cpu().numpy()}

    def save_checkpoint(self, filename: str) -> None:
        """Write the checkpoint of a trainer of this package under its name with :data:`HINT`; else as in stock."""
        own = type(self)
        if own.__module__.startswith("nnunet_plugins."):
            self.__class__ = type(own.__name__ + HINT, (own,), {})  # nnU-Net writes the name of the class
        try:
            super().save_checkpoint(filename)  # type: ignore[misc]
        finally:
            self.__class__ = own

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Continue from a checkpoint; settings that changed since are named.

        Raises:
            ValueError: the network of the checkpoint has other settings and does not fit.
        """
        changed = self._changed_since(filename_or_checkpoint)
        try:
            super().load_checkpoint(filename_or_checkpoint)  # type: ignore[misc]
        except RuntimeError as error:
            if changed and "Error(s) in loading state_dict" in str(error):
                raise ValueError(
                    f"the checkpoint does not fit the network of now: {changed}. Set that back under "
                    f'"{self.settings_key}" in the plans (or in the class), or train anew without --c.'
                ) from None
            raise
        if changed:
            self.print_to_log_file(f"continuing with changed settings: {changed}")  # type: ignore[attr-defined]

    def _changed_since(self, checkpoint: Any) -> str:
        """Name the settings that differ from those of a checkpoint, with both values; empty when none do."""
        if isinstance(checkpoint, str):
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
        stored = _settings(
            checkpoint["init_args"]["plans"], checkpoint["init_args"]["configuration"], self.settings_key
        )
        manager = self.configuration_manager  # type: ignore[attr-defined]
        now = json.loads(json.dumps(manager.configuration.get(self.settings_key, {})))
        names = [name for name in {**stored, **now} if name != "stock" and stored.get(name) != now.get(name)]
        return "; ".join(f"{name} was {stored.get(name)} and is {now.get(name)}" for name in names)


def _settings(plans: dict, configuration: str, key: str) -> dict[str, Any]:
    """The settings of a configuration in plans as they are on disk, lists for tuples."""
    found: dict[str, Any] = json.loads(json.dumps(plans["configurations"][configuration].get(key, {})))
    return found

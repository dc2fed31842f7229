"""One training of the organ comparison, in pieces: time in the place of epochs, checkpoints with the random state."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_memeff.memory import measure_peak
from tests.benchmarks.nnunet_organs_data import CONFIGURATION, NAME
from tests.benchmarks.nnunet_organs_rows import Recipe

METERED = 100
"""Steps from one measured peak to the next; the second and the third step are measured too."""

SAVED = 120
"""Seconds of the clock from one checkpoint to the next."""


@dataclass(frozen=True)
class Budget:
    """What a training may use: seconds of the clock, or iterations, which no clock disturbs."""

    seconds: float | None
    iterations: int | None = None

    def share(self, progress: Progress) -> float:
        """How much of it is used, 1 at the end."""
        if self.iterations is not None:
            return progress.iterations / self.iterations
        assert self.seconds is not None
        return progress.seconds / self.seconds


@dataclass
class Progress:
    """What a training has used and seen."""

    seconds: float = 0.0
    iterations: int = 0
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def clock(device: torch.device) -> Callable[[], float]:
    """The CPU time of this process, or wall time when a GPU works: every step ends with reading the loss."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def build_trainer(recipe: Recipe, work: Path, device: torch.device) -> Any:
    """The trainer itself, not a class derived from it; nothing is mirrored, since organs are left and right."""
    from nnunetv2.run.run_training import recursive_find_trainer_class_by_name

    folder = work / "preprocessed" / NAME
    plans = json.loads((folder / f"{recipe.plans}.json").read_text())
    plans["configurations"][CONFIGURATION].update(json.loads(json.dumps(recipe.settings)))
    plans["continue_training"] = False
    dataset = json.loads((folder / "dataset.json").read_text())
    trainer = recursive_find_trainer_class_by_name(recipe.trainer)(plans, CONFIGURATION, 0, dataset, device)
    stock = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size

    def without_mirroring() -> tuple[Any, ...]:
        rotation, flat, initial_patch_size, _ = stock()
        trainer.inference_allowed_mirroring_axes = None
        return rotation, flat, initial_patch_size, None

    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size = without_mirroring
    return trainer


def train_piece(trainer: Any, seed: int, budget: Budget, seconds_this_time: float) -> tuple[Progress, float]:
    """Train until the budget, or the seconds of this time, are used; goes on from what an earlier piece left.

    The learning rate falls by nnU-Net's polynomial over the budget. The final checkpoint is nnU-Net's own, and is there
    when the budget is used.

    Returns:
        The progress, and the seconds of this time.
    """
    seed_everything(seed)
    trainer.initialize()
    folder = Path(trainer.output_folder)
    state = torch.load(folder / "progress.pt", weights_only=False) if (folder / "progress.pt").exists() else None
    progress = state["progress"] if state else Progress()
    if state:
        trainer.load_checkpoint(str(folder / state["checkpoint"]))
    if budget.share(progress) >= 1:
        return progress, 0.0
    trainer.on_train_start()
    trainer.network.train()
    set_random_state(state["random"]) if state else seed_everything(seed)
    began = saved = progress.seconds
    while budget.share(progress) < 1 and progress.seconds - began < seconds_this_time:
        step(trainer, budget, progress)
        if progress.seconds - saved > SAVED:
            save(trainer, progress)
            saved = progress.seconds
    save(trainer, progress)
    if budget.share(progress) >= 1:
        trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    return progress, progress.seconds - began


def step(trainer: Any, budget: Budget, progress: Progress) -> None:
    """Load, augment and learn from one batch, on the clock."""
    now = clock(trainer.device)
    start = now()
    trainer.lr_scheduler.step(trainer.num_epochs * budget.share(progress))
    batch = next(trainer.dataloader_train)
    metered = progress.iterations in (1, 2) or progress.iterations % METERED == METERED - 1
    with measure_peak(trainer.device) if metered else nullcontext() as meter:
        loss = float(trainer.train_step(batch)["loss"])
    if meter is not None:
        progress.peak_bytes = max(progress.peak_bytes, meter.peak_bytes)
    progress.losses.append(round(loss, 4))
    progress.iterations += 1
    progress.seconds += now() - start


def save(trainer: Any, progress: Progress) -> None:
    """Write nnU-Net's checkpoint, then the file that names it; whatever moment it is killed, one pair is whole."""
    folder = Path(trainer.output_folder)
    checkpoint = f"checkpoint_{progress.iterations}.pth"
    trainer.save_checkpoint(str(folder / checkpoint))
    torch.save({"progress": progress, "checkpoint": checkpoint, "random": random_state()}, folder / "progress.new")
    (folder / "progress.new").replace(folder / "progress.pt")
    for older in folder.glob("checkpoint_*.pth"):
        if older.name not in (checkpoint, "checkpoint_final.pth"):
            older.unlink()


def seed_everything(seed: int) -> None:
    """Seed the generators that weights, batches and augmentation draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> tuple[Any, ...]:
    """State of these generators."""
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu


def set_random_state(state: tuple[Any, ...]) -> None:
    """Set them back."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])

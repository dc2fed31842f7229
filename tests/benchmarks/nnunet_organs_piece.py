"""One piece of a training of the organ comparison and, when it was the last, its row."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import statistics
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch

from tests.benchmarks import nnunet_organs_data as data
from tests.benchmarks.nnunet_organs_rows import Row, folder_of, key_of, recipe_of
from tests.benchmarks.nnunet_organs_scores import predict, score
from tests.benchmarks.nnunet_organs_train import Budget, Progress, build_trainer, train_piece


def train(options: Any, log: TextIO) -> float:
    """Train one piece; when it was the last, predict, score and append a row. Returns the seconds used this time."""
    data.set_folders(options.work, folder_of(options))
    if options.device == "cpu":
        torch.set_num_threads(1)
        os.environ.update(nnUNet_n_proc_DA="0")  # loading and augmentation are on this process's clock
    with contextlib.redirect_stdout(log):
        trainer = build_trainer(recipe_of(options), options.work, torch.device(options.device))
        budget = Budget(options.seconds, options.iterations)
        progress, used = train_piece(trainer, options.seed, budget, options.seconds_this_time)
        if budget.share(progress) < 1:
            return used
        row = {**key_of(options), **described(trainer, progress), **scored(trainer, options)}
    with options.jsonl.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")
    return used


def described(trainer: Any, progress: Progress) -> Row:
    """What the training was and took."""
    configuration = trainer.configuration_manager
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "nnunetv2")},
        "patch": [int(extent) for extent in configuration.patch_size],
        "batch": trainer.batch_size,
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
        "used": round(progress.seconds, 1),
        "iterations": progress.iterations,
        "step_peak_mib": round(progress.peak_bytes / 2**20, 1),
        "losses": [round(statistics.mean(part), 3) for part in tenths(progress.losses)],
    }


def tenths(values: list[float]) -> Iterator[list[float]]:
    """Ten parts of equal length, or fewer where there are fewer values."""
    length = max(1, len(values) // 10)
    for start in range(0, length * min(10, len(values)), length):
        yield values[start : start + length]


def scored(trainer: Any, options: Any) -> Row:
    """Dice of validation and test patients, and what prediction took."""
    setting = json.loads((options.work / "setting.json").read_text())
    parts = {part: data.names_of(part, setting["splits"]) for part in ("validation", "test")}
    model = Path(trainer.output_folder_base)
    took = predict(model, options.work, parts, trainer.device)
    organs = trainer.dataset_json["labels"]
    return {**took, **{part: score(model, options.work, part, organs) for part in parts}}

"""Rows of the organ comparison: what every trainer is run with, and which trainings have their line of JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A trainer, its plans, and what is changed in them."""

    trainer: str
    plans: str = "nnUNetPlans"
    settings: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "nnUNetTrainer": Recipe("nnUNetTrainer"),
    "ResEncM": Recipe("nnUNetTrainer", "nnUNetResEncUNetMPlans"),
    "SparseTrainer": Recipe("SparseTrainer"),
    "OccupancyTrainer": Recipe(
        "OccupancyTrainer", settings={"occupancy_trainer": {"patch_size": [64, 96, 64], "points": 6000}}
    ),
    "CLSTMTrainer": Recipe("CLSTMTrainer", settings={"clstm_trainer": {"channels": [16, 32, 64, 128, 256]}}),
    "HaloTrainer": Recipe("HaloTrainer", settings={"patch_size": [48, 64, 32]}),
}
"""For crops of 64 x 64 x 96 voxels and plans of 0.25 GB, where a step of stock takes 284 MiB, of ResEnc-M 258 and of
SparseTrainer 165 at the crop's size. Halo's patch and the number of points are scaled from steps of 196 MiB at stock's
patch and 650 MiB with 16384 points, so as to stay below stock's. The recurrent network is narrowed four times, since a
step of half its default width takes 8 CPU-seconds. Every row says what its steps took."""

SAME = ("name", "seed", "settings", "seconds", "iterations_asked", "plan_gb", "crop", "device")


def key_of(options: Any) -> Row:
    """What tells a training from others: name, seed, settings and budget, and the plan and crop of its data."""
    setting = json.loads((options.work / "setting.json").read_text())
    recipe = recipe_of(options)
    return {
        "name": options.trainer,
        "seed": options.seed,
        "settings": recipe.settings,
        "seconds": options.seconds,
        "iterations_asked": options.iterations,
        "plan_gb": setting["plan_gb"],
        "crop": setting["crop"],
        "device": options.device,
    }


def recipe_of(options: Any) -> Recipe:
    """The recipe of a name, with the settings of the command line on top, one level deep."""
    recipe = RECIPES[options.trainer]
    settings = json.loads(json.dumps(recipe.settings))
    for key, value in options.settings.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return replace(recipe, settings=settings)


def read(jsonl: Path) -> list[Row]:
    """All rows there are."""
    return [json.loads(line) for line in jsonl.read_text("utf-8").splitlines()] if jsonl.exists() else []


def is_done(options: Any) -> bool:
    """Whether there is a row of this training."""
    key = key_of(options)
    return any(all(row.get(name) == key[name] for name in SAME) for row in read(options.jsonl))


def folder_of(options: Any) -> Path:
    """Where a training keeps its results: readable, and its own for every setting."""
    key = key_of(options)
    changed = json.dumps([key["settings"], key["seconds"], key["iterations_asked"]], sort_keys=True)
    return options.work / "results" / f"{options.trainer}_{options.seed}_{short(changed)}"


def short(text: str) -> str:
    """Eight characters that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]

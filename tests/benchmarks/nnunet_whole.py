"""Whole volumes against tiles for a model of stock nnU-Net: voxels that differ, and Dice of both on real labels.

Stock nnU-Net trains on OpenKBP as in ``nnunet_organs.py`` (five organs, 14 patients), with fewer features so that
minutes are enough; or ``--model`` names the folder TRAINER__PLANS__3d_fullres of a training there. The six test
patients are predicted in tiles (``MEMEFF_NNUNET=lean``, the labels of stock) and whole (``MEMEFF_NNUNET=whole``), once
as the crops that were trained on and once as the scans are, which are mostly air.

    python tests/benchmarks/nnunet_organs.py prepare --work W --data OPENKBP --crop 64 64 96 --plan-gb 0.25
    python tests/benchmarks/nnunet_whole.py --work W --data OPENKBP --iterations 600
    python tests/benchmarks/nnunet_whole.py --work W --data OPENKBP --model FOLDER

One line of JSON for crops and one for scans. A training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nibabel
import numpy as np
import torch

from tests.benchmarks import nnunet_organs_data as organs
from tests.benchmarks.nnunet_organs_rows import Recipe
from tests.benchmarks.nnunet_organs_scores import dice
from tests.benchmarks.nnunet_organs_train import Budget, build_trainer, train_piece

FEATURES = [8, 16, 32, 64]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that nnunet_organs.py prepared")
    parser.add_argument("--data", type=Path, required=True, help="the OpenKBP folder")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--model", type=Path, help="a trained model's folder, in the place of a training")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def train(work: Path, iterations: int) -> Path:
    """Train the stock trainer with a narrow network of the same plan; returns the folder of the model."""
    organs.set_folders(work, work / f"whole_{iterations}")
    torch.set_num_threads(1)
    os.environ.update(nnUNet_n_proc_DA="0")
    plans = json.loads((work / "preprocessed" / organs.NAME / "nnUNetPlans.json").read_text())
    network = plans["configurations"][organs.CONFIGURATION]["architecture"]
    network["arch_kwargs"]["features_per_stage"] = FEATURES[: network["arch_kwargs"]["n_stages"]]
    with (work / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        recipe = Recipe("nnUNetTrainer", settings={"architecture": network})
        trainer = build_trainer(recipe, work, torch.device("cpu"))
        train_piece(trainer, 0, Budget(None, iterations), float("inf"))
    return Path(trainer.output_folder_base)


def images_of(kind: str, work: Path, data: Path) -> tuple[Path, Path]:
    """Folders of the test patients' images and labels: crops as they were prepared, or whole scans."""
    raw = work / "raw" / organs.NAME
    if kind == "crops":
        return raw / "imagesTs", raw / "labelsTs"
    images, labels = work / "scans", work / "scans_labels"
    for name in organs.names_of("test"):
        for file, target in (("ct", images / f"{name}_0000.nii.gz"), ("oar", labels / f"{name}.nii.gz")):
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((data / f"{name}_{file}.nii.gz").read_bytes())
    return images, labels


def predict(model: Path, images: Path, way: str) -> Path:
    """Predict a folder of images by the command; returns the folder of labels."""
    out = model / f"{images.name}_{way}"
    words = ["-i", images, "-o", out, "-m", model, "-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0]
    command = [sys.executable, "-m", "nnunet_plugins", "predict", *map(str, words)]
    root = str(Path(__file__).resolve().parents[2])
    variables = {"MEMEFF_NNUNET": way, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def compare(tiles: Path, whole: Path, labels: Path) -> dict[str, Any]:
    """Voxels that differ, and mean Dice of every organ."""
    found: dict[str, Any] = {"voxels": 0, "differ": 0, "foreground": 0}
    scores: dict[str, list[list[float | None]]] = {"tiles": [], "whole": []}
    for file in sorted(tiles.glob("*.nii.gz")):
        one, other, truth = (
            np.asarray(nibabel.load(folder / file.name).dataobj).round() for folder in (tiles, whole, labels)
        )
        found["voxels"] += one.size
        found["differ"] += int((one != other).sum())
        found["foreground"] += int((truth > 0).sum())
        for way, predicted in (("tiles", one), ("whole", other)):
            scores[way].append([dice(predicted == organ, truth == organ) for organ in range(1, 6)])
    for way, rows in scores.items():
        means = np.nanmean(np.array(rows, float), 0)
        found[f"dice_{way}"] = [round(float(value), 3) for value in means]
        found[f"mean_{way}"] = round(float(means.mean()), 3)
    return found


def main() -> None:
    """Train, predict both ways, compare."""
    options = parsed()
    model = options.model.resolve() if options.model else train(options.work, options.iterations)
    for kind in ("crops", "scans"):
        images, labels = images_of(kind, options.work, options.data)
        tiles, whole = (predict(model, images, way) for way in ("lean", "whole"))
        name = options.model.name if options.model else f"{options.iterations} iterations"
        print(json.dumps({"images": kind, "model": name, **compare(tiles, whole, labels)}), flush=True)


if __name__ == "__main__":
    main()

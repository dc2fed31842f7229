"""What a finished training of the organ comparison is worth: Dice of every organ, seconds and peak of prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from monai_memeff.memory import measure_peak
from tests.benchmarks.nnunet_organs_data import NAME
from tests.benchmarks.nnunet_organs_train import clock

Scores = dict[str, dict[str, "float | None"]]


def predict(model: Path, work: Path, parts: dict[str, list[str]], device: torch.device) -> dict[str, Any]:
    """Predict patients with nnU-Net's predictor, as its command does; returns seconds per case and the peak of one.

    The first case is predicted twice: once for the peak, not timed, and once for the time.

    Args:
        model: nnU-Net's folder of the trained model; predictions go to its fold's folder.
        work: Folder of the comparison.
        parts: names of the patients of each part.
        device: to predict on.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=device, verbose=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    now, peak, seconds = clock(device), 0, []
    for part, names in parts.items():
        images = work / "raw" / NAME / ("imagesTs" if part == "test" else "imagesTr")
        predicted = model / "fold_0" / part
        predicted.mkdir(exist_ok=True)
        for name in names:
            words = [[str(images / f"{name}_0000.nii.gz")]], [str(predicted / name)]
            if not seconds:
                with measure_peak(device) as meter:
                    predictor.predict_from_files_sequential(*words)
                peak = meter.peak_bytes
            start = now()
            predictor.predict_from_files_sequential(*words)
            seconds.append(now() - start)
    return {"predict_seconds": round(float(np.mean(seconds)), 3), "predict_peak_mib": round(peak / 2**20, 1)}


def score(model: Path, work: Path, part: str, organs: dict[str, int]) -> Scores:
    """Dice of every patient and organ; None where prediction and reference are empty, as in nnU-Net."""
    truth = work / "raw" / NAME / ("labelsTs" if part == "test" else "labelsTr")
    scores: Scores = {}
    for file in sorted((model / "fold_0" / part).glob("*.nii.gz")):
        predicted, reference = (np.asarray(nibabel.load(f).dataobj) for f in (file, truth / file.name))
        scores[file.name.removesuffix(".nii.gz")] = {
            organ: dice(predicted == label, reference == label) for organ, label in organs.items() if label
        }
    return scores


def dice(predicted: np.ndarray, reference: np.ndarray) -> float | None:
    """Twice what both share over the sum of both."""
    both = int(predicted.sum()) + int(reference.sum())
    return round(2 * int((predicted & reference).sum()) / both, 4) if both else None

"""The proof on this machine: a small model predicted by stock nnU-Net and leanly, and the voxels that differ."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np

from nnunet_plugins.lean.switch import lean_prediction, stock_prediction
from nnunet_plugins.lean.trial import TrialModel, predictor_of

SHAPE, SPACING = (18, 24, 21), (2.0, 0.9, 1.1)


def differing_voxels() -> tuple[int, int]:
    """Predict an image of noise both ways.

    Returns:
        Number of voxels whose labels differ, and number of all voxels.
    """
    labels = {"background": 0, **{f"label{number}": number for number in range(1, 6)}}
    model = TrialModel(labels, patch=(16, 16, 16), folds=2, mirroring=(0,), transpose=(1, 0, 2))
    image = np.random.default_rng(0).normal(0, 100, (1, *SHAPE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        predictor = predictor_of(model.write(Path(folder)))
        results = []
        for way in (stock_prediction, lean_prediction):
            with way():
                results.append(predictor.predict_single_npy_array(image, {"spacing": list(SPACING)}))
    return int((results[0] != results[1]).sum()), results[0].size

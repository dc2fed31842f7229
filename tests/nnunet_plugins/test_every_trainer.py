"""Stock nnU-Net's model and the four trainers through nnU-Net's choice of models, its ensembles, and MONAI's runner."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from tests.nnunet_plugins.conftest import SMALL
from tests.nnunet_plugins.host import Host, labels_of

pytestmark = pytest.mark.slow

NAME, NUMBER = "Dataset941_Every", 941

SHORT = '''"""Our other trainers, short and small."""
from nnunet_plugins import CLSTMTrainer, HaloTrainer, OccupancyTrainer
from short_trainers import Short


class ShortCLSTMTrainer(Short, CLSTMTrainer):
    """Few channels."""
    channels = (2, 3)


class ShortOccupancyTrainer(Short, OccupancyTrainer):
    """Few channels."""
    channels, width = (4, 4), 8


class ShortHaloTrainer(Short, HaloTrainer):
    """Stock's network."""
'''

TRAINERS = ["ShortStockTrainer", "ShortSparseTrainer", "ShortCLSTMTrainer", "ShortOccupancyTrainer", "ShortHaloTrainer"]

TRAIN = """#!/bin/sh
# nnUNetv2_train on a machine without a GPU; what is trained already is only noted.
echo "$@" >> {noted}
[ -e "{results}/$5__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth" ] || exec {real} "$@" -device cpu
"""

RUNNER = """
import sys
import torch
from monai.apps.nnunet import nnUNetV2Runner
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

start = nnUNetPredictor.__init__  # the runner takes the first GPU and cannot be told otherwise
nnUNetPredictor.__init__ = lambda self, **more: start(self, **{**more, "device": torch.device("cpu")})
folder, *names = sys.argv[1:]
for name in names:
    config = {"dataset_name_or_id": 941, "modality": "MRI", "datalist": "", "dataroot": folder}
    config |= {f"nnunet_{part}": f"{folder}/{part}" for part in ("raw", "preprocessed", "results")}
    runner = nnUNetV2Runner(config, trainer_class_name=name)
    runner.train_single_model("3d_fullres", 0)
    runner.find_best_configuration(configs="3d_fullres", folds=(0,), allow_ensembling=False)
    runner.predict_ensemble_postprocessing(
        folds=(0,), num_processes_preprocessing=0, num_processes_segmentation_export=0
    )
    import shutil
    shutil.move(f"{folder}/results/Dataset941_Every/pred_3d_fullres", f"{folder}/runner_{name}")
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, small_host: Host) -> Host:
    """A preprocessed dataset of three images."""
    host = Host(tmp_path_factory.mktemp("nnunet"))
    (host.folder / "own_trainers" / "short_others.py").write_text(SHORT)
    host.adopt(small_host, SMALL, NAME)
    host.split(NAME, ["c_000", "c_001"], ["c_002"])
    return host


def train(trainer: str, *more: object) -> list[object]:
    """A command that trains and keeps the probabilities of the validation."""
    return ["nnUNetv2_train", NUMBER, "3d_fullres", 0, "-tr", trainer, "-device", "cpu", "--npz", *more]


def predict(host: Host, trainer: str, out: Path, *more: object) -> list[object]:
    """A command that predicts the one test image, mirrored where the trainer allows it."""
    folders = ["-i", host.raw / NAME / "imagesTs", "-o", out]
    settings = ["-d", NUMBER, "-c", "3d_fullres", "-f", 0, "-tr", trainer, "-device", "cpu", "-npp", 0, "-nps", 0]
    return ["nnUNetv2_predict", *folders, *settings, *more]


@pytest.mark.long
def test_every_trainer_in_nnunets_commands_and_monais_runner(host: Host, tmp_path: Path) -> None:
    trained, halo = TRAINERS[:-1], TRAINERS[-1]
    stock = tmp_path / "stock"
    host.run_in_one_process(
        *[train(trainer) for trainer in trained],
        *[predict(host, trainer, stock / trainer, "--save_probabilities") for trainer in trained],
        ["nnUNetv2_ensemble", "-i", stock / trained[0], stock / trained[1], "-o", stock / "both", "-np", 1],
    )
    # MONAI's runner, with lean prediction; it trains the last one by the true command
    (tmp_path / "runner.py").write_text(RUNNER)
    real = shutil.which("nnUNetv2_train", path=str(Path(sys.executable).parent)) or "nnUNetv2_train"
    command = tmp_path / "bin" / "nnUNetv2_train"
    command.parent.mkdir()
    command.write_text(TRAIN.format(noted=tmp_path / "noted", results=host.results / NAME, real=real))
    command.chmod(0o755)
    lean = tmp_path / "lean"
    host.run_in_one_process(
        ["python", tmp_path / "runner.py", host.folder, *TRAINERS],
        ["nnUNetv2_find_best_configuration", NUMBER, "-c", "3d_fullres", "-tr", trained[0], halo, "-f", 0, "-np", 1],
        *[predict(host, trainer, lean / trainer, "--save_probabilities") for trainer in trained],
        ["nnUNetv2_ensemble", "-i", lean / trained[0], lean / trained[1], "-o", lean / "both", "-np", 1],
        predict(host, halo, lean / halo),
        MEMEFF_NNUNET="lean",
        PATH=f"{command.parent}:/usr/bin:/bin",
    )
    noted = (tmp_path / "noted").read_text().splitlines()
    assert [line.split()[:5] for line in noted] == [["941", "3d_fullres", "0", "-tr", name] for name in TRAINERS]
    best = json.loads((host.results / NAME / "inference_information.json").read_text())
    assert len(best["all_results"]) == 3  # two models and their ensemble
    for trainer in trained:
        expected = labels_of(stock / trainer)["c_003.nii.gz"]
        for found in (labels_of(lean / trainer), labels_of(host.folder / f"runner_{trainer}")):
            np.testing.assert_array_equal(found["c_003.nii.gz"], expected)
        one, other = (np.load(way / trainer / "c_003.npz")["probabilities"] for way in (stock, lean))
        np.testing.assert_array_equal(one, other)
    for name, labels in labels_of(stock / "both").items():
        np.testing.assert_array_equal(labels_of(lean / "both")[name], labels)
    assert labels_of(lean / halo).keys() == labels_of(host.folder / f"runner_{halo}").keys() == {"c_003.nii.gz"}

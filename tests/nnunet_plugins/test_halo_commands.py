"""nnU-Net's own commands with -tr HaloTrainer: train, validate on whole images, continue, and predict as stock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from tests.nnunet_plugins.host import Host, labels_of, write_dataset

SHORT = '''"""A short trainer in a user's own folder."""
import sys

from nnunet_plugins import HaloTrainer


class ShortHaloTrainer(HaloTrainer):
    """Two iterations an epoch."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2 if "--c" in sys.argv else 1
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1
'''


@pytest.mark.exhaustive
def test_train_validate_continue_and_predict(tmp_path: Path) -> None:
    host = Host(tmp_path / "nnunet")
    (host.folder / "own_trainers" / "short_halo.py").write_text(SHORT)
    name = "Dataset931_Halo"
    dataset = write_dataset(host.raw, name, 2, (16, 20, 18))
    host.prepare(dataset, 931, "-gpu_memory_target", 0.02)
    host.split(name, ["c_000"], ["c_001"])
    train = ["nnUNetv2_train", 931, "3d_fullres", 0, "-tr", "ShortHaloTrainer", "-device", "cpu"]
    predict = ["nnUNetv2_predict", "-i", host.raw / name / "imagesTs", "-o", tmp_path / "out", "-d", 931]
    predict += ["-c", "3d_fullres", "-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0, "-tr", "ShortHaloTrainer"]
    host.run_in_one_process(train, predict)
    fold = host.results / name / "ShortHaloTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    assert json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]
    assert list(labels_of(tmp_path / "out")) == ["c_002.nii.gz"]
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    stock = fold.parents[1] / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    host.run_in_one_process([*train, "--c"], [*train, "--val"], MEMEFF_NNUNET="whole")
    fold.parent.rename(stock)  # a stock model folder for a machine without this package
    predict[predict.index("ShortHaloTrainer")] = "nnUNetTrainer"
    host.run_in_one_process(predict, MEMEFF_NO_NNUNET="1", nnUNet_extTrainer="")

"""nnU-Net's own commands with -tr HaloTrainer: two processes of torchrun, then stock, one process, and stock again."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from tests.nnunet_plugins.conftest import SMALL
from tests.nnunet_plugins.host import Host, labels_of

pytestmark = pytest.mark.slow

SHORT = '''"""A short trainer in a user's own folder."""
from nnunet_plugins import HaloTrainer
from short_trainers import Short


class ShortHaloTrainer(Short, HaloTrainer):
    """Stock's network."""


class ShortGroupsTrainer(ShortHaloTrainer):
    """Two processes share a patch, the next two another one."""
    processes_per_patch = 2
'''

NAME = "Dataset931_Halo"
HALO, STOCK, GROUPS = "ShortHaloTrainer", "ShortStockTrainer", "ShortGroupsTrainer"
TORCHRUN = ["--standalone", "--nproc_per_node", 2, "--no-python"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, small_host: Host) -> Host:
    """Preprocessed images, one of them to train; trained and validated by two processes of torchrun."""
    host = Host(tmp_path_factory.mktemp("nnunet"))
    (host.folder / "own_trainers" / "short_halo.py").write_text(SHORT)
    host.adopt(small_host, SMALL, NAME)
    host.split(NAME, ["c_000"], ["c_001"])
    command, *options = train(HALO)
    script = shutil.which(str(command), path=str(Path(sys.executable).parent))
    host.run("torchrun", *TORCHRUN, script, *options, CUDA_VISIBLE_DEVICES="")
    return host


def train(trainer: str, *more: object) -> list[object]:
    """A command that trains."""
    return ["nnUNetv2_train", 931, "3d_fullres", 0, "-tr", trainer, "-device", "cpu", *more]


def model_of(host: Host, trainer: str) -> Path:
    """The folder of a trained model."""
    return host.results / NAME / f"{trainer}__nnUNetPlans__3d_fullres"


def hand_over(host: Host, before: str, after: str) -> None:
    """Make one trainer's model the other's, to be continued."""
    shutil.copytree(model_of(host, before), model_of(host, after), dirs_exist_ok=True)
    fold = model_of(host, after) / "fold_0"
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    shutil.rmtree(fold / "validation")


def assert_validated(host: Host, trainer: str) -> None:
    """The final validation came to its end."""
    folder = model_of(host, trainer) / "fold_0" / "validation"
    assert json.loads((folder / "summary.json").read_text())["foreground_mean"]
    assert list(labels_of(folder)) == ["c_001.nii.gz"]


@pytest.mark.long
def test_two_processes_of_torchrun_train_and_validate_by_the_true_command(host: Host) -> None:
    assert_validated(host, HALO)
    (log,) = (model_of(host, HALO) / "fold_0").glob("training_log*.txt")  # the first process's alone
    assert log.read_text().count("Epoch 0") == 1
    checkpoint = torch.load(model_of(host, HALO) / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["current_epoch"] == 1


@pytest.mark.long
def test_two_groups_of_two_processes_go_on_and_validate(host: Host) -> None:
    hand_over(host, HALO, GROUPS)
    printed = host.run_in_one_process(["ranks:4", *train(GROUPS, "--c")], SHORT_EPOCHS="2")
    assert printed.count("worker 0 batch_size 1") == printed.count("worker 1 batch_size 1") == 2  # stock's words
    assert_validated(host, GROUPS)
    before, log = sorted((model_of(host, GROUPS) / "fold_0").glob("training_log*.txt"), key=os.path.getmtime)
    assert "Epoch 0" in before.read_text()
    assert log.read_text().count("Epoch 1") == 1
    checkpoint = torch.load(model_of(host, GROUPS) / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert (checkpoint["trainer_name"], checkpoint["current_epoch"]) == ("nnUNetTrainer", 2)
    assert len(checkpoint["logging"]["train_losses"]) == 2
    printed = host.run_in_one_process(["ranks:3", "fails", *train(GROUPS)])
    assert "3 processes cannot be divided into groups of 2 that share a patch" in printed


@pytest.mark.long
def test_stock_goes_on_then_halo_and_stock_predicts(host: Host, tmp_path: Path) -> None:
    hand_over(host, HALO, STOCK)
    printed = host.run_in_one_process(train(STOCK, "--c"), SHORT_EPOCHS="2")
    assert "Epoch 1" in printed
    assert "Epoch 0" not in printed
    hand_over(host, STOCK, HALO)
    printed = host.run_in_one_process(train(HALO, "--c"), train(HALO, "--val"), SHORT_EPOCHS="3", MEMEFF_NNUNET="whole")
    assert "Epoch 2" in printed
    assert "Epoch 1" not in printed
    assert_validated(host, HALO)
    stock = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"  # a model folder for a machine without this package
    shutil.copytree(model_of(host, HALO), stock)
    folders = ["-i", host.raw / NAME / "imagesTs", "-o", tmp_path / "out", "-m", stock]
    predict = ["nnUNetv2_predict_from_modelfolder", *folders, "-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1]
    host.run_in_one_process(predict, MEMEFF_NO_NNUNET="1", nnUNet_extTrainer="")
    assert list(labels_of(tmp_path / "out")) == ["c_003.nii.gz"]

"""OccupancyTrainer: what it makes of plans, and nnU-Net's own commands from training to a model shared as a zip."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunet_plugins.occupancy_network import OccupancyPlansNet
from nnunet_plugins.occupancy_trainer import KEY, SETTINGS, OccupancyTrainer, edit_plans
from tests.nnunet_plugins.host import Host, labels_of, write_dataset

NAME = "Dataset904_Organs"
TRAINER = "ShortOccupancyTrainer"
PREDICT = ["-c", "3d_fullres", "-f", 0, "-device", "cuda", "-npp", 0, "-nps", 0, "--disable_tta"]
TRAINERS = '''"""A short occupancy trainer in a user's own folder."""
import sys

from nnunet_plugins import OccupancyTrainer


class ShortOccupancyTrainer(OccupancyTrainer):
    """A few iterations with few features."""

    channels, width, blocks, points, learning_rate = (8, 16), 32, 2, 4096, 0.01

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2 if "--c" in sys.argv else 1
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 8, 1

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, initial, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None  # seven predictions of a tile less
        return rotation, dummy_2d, initial, None
'''

# Plans


def stock_plans() -> dict:
    """The parts of a plan that are read."""
    full = {"patch_size": [64, 64, 48], "architecture": {"network_class_name": "stock"}, "data_identifier": "x"}
    flat = {"patch_size": [512, 512], "architecture": {}}
    return {
        "dataset_name": "Dataset900_X",
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": full, "2d": flat},
    }


LABELS = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}}
REGIONS = {**LABELS, "labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


def defaults() -> dict:
    """The trainer's settings."""
    return {name: getattr(OccupancyTrainer, name) for name in SETTINGS}


def test_the_plan_gets_our_network_and_keeps_the_rest():
    plans = stock_plans()
    settings = edit_plans(plans, "3d_fullres", LABELS, defaults())
    once = copy.deepcopy(plans)
    assert edit_plans(plans, "3d_fullres", LABELS, defaults()) == settings
    assert plans == once == json.loads(json.dumps(plans))
    edited = plans["configurations"]["3d_fullres"]
    assert edited["patch_size"] == [64, 64, 48]
    assert edited["data_identifier"] == "x"
    assert edited[KEY] == settings
    network = OccupancyPlansNet(1, 3, **edited["architecture"]["arch_kwargs"], deep_supervision=False)
    assert network.points_per_pass == OccupancyTrainer.points_per_pass


def test_settings_in_the_plans_go_first():
    plans = stock_plans()
    plans["configurations"]["3d_fullres"][KEY] = {"points": 77, "width": 9, "patch_size": [96, 96, 96]}
    settings = edit_plans(plans, "3d_fullres", LABELS, defaults())
    assert (settings["points"], settings["blocks"]) == (77, OccupancyTrainer.blocks)
    edited = plans["configurations"]["3d_fullres"]
    assert edited["patch_size"] == [96, 96, 96]
    assert edited["architecture"]["arch_kwargs"]["width"] == 9


def test_what_it_cannot_train_is_refused_in_one_line():
    typo = stock_plans()
    typo["configurations"]["3d_fullres"][KEY] = {"pionts": 77}
    for plans, configuration, dataset, words in (
        (stock_plans(), "2d", LABELS, r"works on volumes, configuration 2d .*3d_fullres"),
        (stock_plans(), "3d_fullres", REGIONS, "needs exclusive labels"),
        (typo, "3d_fullres", LABELS, "unknown setting 'pionts' .* known are channels, width"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            edit_plans(plans, configuration, dataset, defaults())
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="'octree' or 'dense', got 'fast'"):
        OccupancyPlansNet(1, 2, inference="fast")


def test_the_octree_labels_a_patch_as_every_voxel_does():
    networks = [OccupancyPlansNet(1, 3, (4, 8), 16, 2, 5000, inference).eval() for inference in ("octree", "dense")]
    networks[1].load_state_dict(networks[0].state_dict())
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in (20, 24, 28)], indexing="ij"))
    volume = (4 * (grid**2).sum(0) - 1)[None, None]
    with torch.no_grad():
        labels = [network(volume).argmax(1) for network in networks]
    assert torch.equal(*labels)


# The commands


@pytest.mark.exhaustive
def test_from_training_to_a_shared_model(tmp_path):
    host = Host(tmp_path / "nnunet")
    (host.folder / "own_trainers" / "short_occupancy.py").write_text(TRAINERS)
    dataset = write_dataset(host.raw, NAME, 3, (40, 36, 32))
    host.prepare(dataset, 904, "-gpu_memory_target", 0.05)
    host.split(NAME, ["c_000", "c_001"], ["c_002"])
    train = [904, "3d_fullres", 0, "-tr", TRAINER, "-device", "cuda"]
    model = host.results / NAME / f"{TRAINER}__nnUNetPlans__3d_fullres"
    summary = model / "fold_0" / "validation" / "summary.json"
    images, archive = host.raw / NAME / "imagesTs", tmp_path / "model.zip"
    predict = ["nnUNetv2_predict", "-i", images, "-d", 904, "-tr", TRAINER, *PREDICT, "-o"]
    options = ["-c", "3d_fullres", "-f", 0, "-tr", TRAINER, "--not_strict"]
    printed = host.run_in_one_process(
        ["nnUNetv2_train", *train],
        ["nnUNetv2_train", *train, "--c"],
        [*predict, tmp_path / "before"],
        ["nnUNetv2_export_model_to_zip", "-d", 904, "-o", archive, *options],
    )
    assert [printed.count(f"Epoch {number}") for number in range(3)] == [1, 1, 0]
    scores = json.loads(summary.read_text())["mean"]
    assert set(scores) == {"1", "2"}
    assert scores["1"]["Dice"] > 0.3  # it learns: the large organ, in 16 steps
    check_plans(host, model)

    host.results = tmp_path / "received"  # another machine: nothing but the zip file
    host.results.mkdir()
    install = ["nnUNetv2_install_pretrained_model_from_zip", archive]
    host.run_in_one_process(install, [*predict, tmp_path / "after"])
    before, after = labels_of(tmp_path / "before"), labels_of(tmp_path / "after")
    assert before.keys() == after.keys() == {"c_003.nii.gz"}
    for name in before:
        assert before[name].shape == (40, 36, 32)
        np.testing.assert_array_equal(before[name], after[name])


def check_plans(host: Host, model: Path) -> None:
    """Only network and settings changed."""
    stock = json.loads((host.preprocessed / NAME / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    used = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]
    assert used["architecture"]["network_class_name"].endswith("OccupancyPlansNet")
    assert {key for key in used if used[key] != stock.get(key)} == {"architecture", KEY}

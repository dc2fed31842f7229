"""nnU-Net's own commands: weights taken over to other labels, changed settings on --c, and what a receiver reads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

import blosc2

from nnunet_plugins import TRAINERS
from nnunet_plugins.clstm_network import CLSTMPlansUNet
from nnunet_plugins.networks import WORD, mark_class_layers
from nnunet_plugins.occupancy_network import OccupancyPlansNet
from nnunet_plugins.plans_network import CoarseToSparsePlansUNet
from nnunet_plugins.sparse_plans import why_not_larger
from nnunet_plugins.training.trainer_mixin import HINT
from tests.nnunet_plugins.conftest import SMALL
from tests.nnunet_plugins.host import Host

NETWORKS = {
    "CLSTMTrainer": lambda classes: CLSTMPlansUNet(2, classes, (2, 3), 2, True),
    "OccupancyTrainer": lambda classes: OccupancyPlansNet(2, classes, (4, 8), 8, 1),
    "SparseTrainer": lambda classes: CoarseToSparsePlansUNet(
        2, classes, [[1, 1, 1], [2, 2, 2], [2, 2, 2]], [4, 4, 4], refine_channels=(4, 4, 4), context_channels=2
    ),
}


def test_every_trainer_is_tried() -> None:
    assert {*NETWORKS, "HaloTrainer"} == set(TRAINERS)  # whose network is stock's


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("before", "after"), [(6, 3), (6, 2), (6, 6), (2, 7)])
def test_weights_go_to_other_labels_and_heads_start_anew(tmp_path: Path, name: str, before: int, after: int) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    trained, network = NETWORKS[name](before), NETWORKS[name](after)
    saved, own = trained.state_dict(), {key: value.clone() for key, value in network.state_dict().items()}
    heads = [key for key in own if f".{WORD}." in key]
    assert 0 < len(heads) < len(own)
    torch.save({"network_weights": saved}, tmp_path / "checkpoint_final.pth")
    load_pretrained_weights(network, str(tmp_path / "checkpoint_final.pth"))
    for key, value in network.state_dict().items():
        assert torch.equal(value, own[key] if key in heads else saved[key])


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpoints_of_before_load_and_the_same_weights_give_the_same(name: str) -> None:
    network, other = NETWORKS[name](3).eval(), NETWORKS[name](3).eval()
    old = {key.replace(f".{WORD}.", "."): value for key, value in network.state_dict().items()}
    other.load_state_dict(old)
    image = torch.rand(1, 2, 16, 16, 16)
    first, second = (net(image) for net in (network, other))
    first, second = (pair[0] if isinstance(pair, list) else pair for pair in (first, second))
    assert torch.equal(first, second)
    wrapped = torch.nn.ModuleDict({"module": network})
    assert any(key.startswith("module.") and f".{WORD}." in key for key in wrapped.state_dict())
    wrapped.load_state_dict(wrapped.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**old, "stranger": torch.zeros(1)})


def test_a_layer_at_the_top_has_a_name_with_both_dots() -> None:
    layer = torch.nn.Linear(3, 2)
    mark_class_layers(layer, lambda: torch.nn.Linear(3, 3))
    assert list(layer.state_dict()) == ["logits.seg_layers.weight", "logits.seg_layers.bias"]
    layer.load_state_dict(layer.state_dict())
    layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})


# By commands

SHORT = '''"""Makes the package's own trainers short, and leaves them their names."""
import os

from nnunet_plugins import clstm_trainer, occupancy_trainer, sparse_trainer


def shorten(trainer):
    start = trainer.__init__

    def __init__(self, plans, configuration, fold, dataset_json, device):
        start(self, plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ.get("SHORT_EPOCHS", "1"))
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 1

    trainer.__init__, trainer.short = __init__, True
    trainer.perform_actual_validation = lambda self, save_probabilities=False: None


for trainer in (clstm_trainer.CLSTMTrainer, occupancy_trainer.OccupancyTrainer, sparse_trainer.SparseTrainer):
    if not hasattr(trainer, "short"):
        shorten(trainer)
clstm_trainer.CLSTMTrainer.channels = (2, 3)
occupancy_trainer.OccupancyTrainer.channels, occupancy_trainer.OccupancyTrainer.width = (4, 4), 8
'''

SIX = {"background": 0, **{f"label{n}": n for n in range(1, 6)}}
DATASETS = {
    "Dataset921_Six": {"labels": SIX},
    "Dataset922_Regions": {
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "rest": 1},
        "regions_class_order": [1, 2, 1],
    },
    "Dataset923_Two": {"labels": {"background": 0, "large": 1}},
    "Dataset924_Same": {"labels": SIX},
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, small_host: Host) -> Host:
    """One preprocessed dataset under four names, with six labels, three regions, two labels, and six again."""
    host = Host(tmp_path_factory.mktemp("nnunet"))
    (host.folder / "own_trainers" / "short_named.py").write_text(SHORT)
    for name, changes in DATASETS.items():
        host.adopt(small_host, SMALL, name, **changes)
        host.split(name, ["c_000"], ["c_001"])
    for file in (host.preprocessed / "Dataset923_Two").rglob("*_seg.b2nd"):  # there is no label 2
        labels = blosc2.open(str(file), mode="a")
        labels[:] = np.minimum(labels[:], 1)
    return host


@pytest.mark.long
def test_other_labels_changed_settings_and_receivers_by_commands(host: Host, tmp_path: Path) -> None:
    commands: list[list[object]] = []
    for name in ("SparseTrainer", "CLSTMTrainer", "OccupancyTrainer"):
        folder = host.results / "Dataset921_Six" / f"{name}__nnUNetPlans__3d_fullres" / "fold_0"
        train = ["nnUNetv2_train", "3d_fullres", 0, "-tr", name, "-device", "cpu"]
        commands.append([train[0], 921, *train[1:]])
        for number in (922, 923, 924) if name == "SparseTrainer" else (923,):
            weights = ["-pretrained_weights", folder / "checkpoint_final.pth"]
            commands.append([train[0], number, *train[1:], *weights])
    predict = ["nnUNetv2_predict", "-i", host.raw / "Dataset921_Six" / "imagesTs", "-o", tmp_path / "out", "-d", 921]
    predict += ["-c", "3d_fullres", "-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta", "-tr"]
    commands.append([*predict, "CLSTMTrainer", "-step_size", 0.7])
    # the plans now ask for another network
    changed = host.preprocessed / "Dataset921_Six" / "nnUNetPlans.json"
    later = host.folder / "later.json"
    plans = json.loads(changed.read_text())
    plans["configurations"]["3d_fullres"]["clstm_trainer"] = {"channels": [3, 4], "recompute": 0.5}
    plans["plans_name"] = "nnUNetPlans"
    later.write_text(json.dumps(plans))
    printed = host.run_in_one_process(*commands)
    assert printed.count("Loading pretrained weights from file") == 5
    assert re.search(r"-step_size 0.7 has no effect: CLSTMPlansUNet predicts whole images", printed)
    assert re.search(r"SparseTrainer: patch size (\[.*\]), as in the stock plan: .*covers the median image", printed)

    shutil.copy(later, changed)
    again = ["nnUNetv2_train", 921, "3d_fullres", 0, "-tr", "CLSTMTrainer", "-device", "cpu", "--c", "fails"]
    # a receiver who has nnU-Net alone
    nobody = ["env:nnUNet_extTrainer=", *predict, "SparseTrainer", "fails"]
    printed = host.run_in_one_process(again, nobody, SHORT_EPOCHS="2")
    assert "the checkpoint does not fit the network of now: channels was [2, 3] and is [3, 4]" in printed
    assert f"Could not find requested nnunet trainer SparseTrainer{HINT}" in printed


def test_why_a_patch_did_not_grow() -> None:
    plan = {
        "sparse_trainer": {"patch_size": None, "memory_share": 0.5},
        "patch_size": [32, 32, 32],
        "median_image_size_in_voxels": [30.0, 32.0, 31.0],
        "architecture": {"arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}},
    }
    assert why_not_larger(plan) == "it covers the median image, [30, 32, 31] voxels, already"
    plan["median_image_size_in_voxels"] = [30.0, 64.0, 31.0]
    assert why_not_larger(plan).startswith("one step larger would need more memory than memory_share = 0.5")
    plan["sparse_trainer"]["patch_size"] = [32, 32, 32]
    assert why_not_larger(plan) == '"patch_size" under "sparse_trainer" says so'


def test_logits_of_whole_volumes_are_half_and_in_one_array() -> None:
    network = CLSTMPlansUNet(1, 40, (2, 3), 2, True).eval()
    image = torch.rand(1, 1, 24, 33, 31)
    with torch.inference_mode():
        logits = network.predict_volume(image)
        np.testing.assert_allclose(logits.float(), network(image), atol=2e-3)
    assert logits.dtype == torch.half
    for bias in (1e6, torch.nan):
        network.head.bias.data[3] = bias
        with torch.inference_mode(), pytest.raises(RuntimeError, match="Encountered inf or NaN"):
            network.predict_volume(image)
    assert network.sink is None

"""nnU-Net's own commands with -tr CLSTMTrainer (shortened): whole volumes from training to a model shared as a zip."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunet_plugins.clstm_network import CLSTMPlansUNet
from nnunet_plugins.clstm_trainer import KEY, SETTINGS, CLSTMTrainer, edit_plans
from nnunet_plugins.training.whole_volume import mirrored
from tests.nnunet_plugins.host import Host, labels_of, write_dataset

NAME = "Dataset903_Heads"
TRAINER = "ShortCLSTMTrainer"

SHORT = '''"""Short; it writes down the shapes it trained on, and validates when it is asked to."""
import os
import sys

from nnunet_plugins import CLSTMTrainer


class ShortCLSTMTrainer(CLSTMTrainer):
    channels, hidden_channels, bidirectional, recompute = (4, 6, 8), 2, True, 0.5

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ.get("SHORT_EPOCHS", "1"))
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1

    def train_step(self, batch):
        print("trained on", tuple(batch["data"].shape), tuple(batch["target"].shape))
        return super().train_step(batch)

    def perform_actual_validation(self, save_probabilities=False):
        if "--val" in sys.argv:
            super().perform_actual_validation(save_probabilities)
'''


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A planned and preprocessed dataset of two images with a patch far smaller than they are."""
    host = Host(tmp_path_factory.mktemp("nnunet"))
    (host.folder / "own_trainers" / "short_clstm.py").write_text(SHORT)
    dataset = write_dataset(host.raw, NAME, 2, (26, 37, 33))
    host.prepare(dataset, 903, "-gpu_memory_target", 0.02)
    host.split(NAME, ["c_000"], ["c_001"])
    return host


@pytest.mark.exhaustive
def test_from_training_to_a_shared_model(host: Host, tmp_path: Path) -> None:
    train = ["nnUNetv2_train", 903, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu"]
    images = host.raw / NAME / "imagesTs"
    options = ["-c", "3d_fullres", "-f", 0, "-device", "cuda", "-npp", 0, "-nps", 0]  # mirroring left on: there is none
    predict = ["nnUNetv2_predict", "-i", images, "-d", 903, "-tr", TRAINER, *options, "-o"]
    archive = tmp_path / "model.zip"
    share = ["-c", "3d_fullres", "-f", 0, "-tr", TRAINER, "--not_strict"]
    export = ["nnUNetv2_export_model_to_zip", "-d", 903, "-o", archive, *share]
    printed = host.run_in_one_process(train)
    trained = [tuple(map(int, found)) for found in re.findall(r"trained on \(1, 2, (\d+), (\d+), (\d+)\)", printed)]
    assert {tuple(sorted(shape)) for shape in trained} == {(26, 33, 37)}
    train[-1] = "cuda"
    more = [*train, "--c"], [*train, "--val"], [*predict, tmp_path / "before"], export
    continued = host.run_in_one_process(*more, SHORT_EPOCHS="2")
    assert "Epoch 1" in continued
    assert "Epoch 0" not in continued
    model = host.results / NAME / f"{TRAINER}__nnUNetPlans__3d_fullres"
    used = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]
    stock = json.loads((host.preprocessed / NAME / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    assert used["architecture"]["network_class_name"] == "nnunet_plugins.clstm_network.CLSTMPlansUNet"
    assert used["data_identifier"] == stock["data_identifier"]
    assert np.prod(stock["patch_size"]) < 26 * 37 * 33
    assert set(json.loads((model / "fold_0" / "validation" / "summary.json").read_text())["mean"]) == {"1", "2"}

    receiver = {"nnUNet_results": str(tmp_path / "received")}
    Path(receiver["nnUNet_results"]).mkdir()
    install = ["nnUNetv2_install_pretrained_model_from_zip", archive]
    host.run_in_one_process(install, [*predict, tmp_path / "after"], **receiver)
    before, after = labels_of(tmp_path / "before"), labels_of(tmp_path / "after")
    assert before.keys() == after.keys() == {"c_002.nii.gz"}
    assert before["c_002.nii.gz"].shape == (26, 37, 33)
    np.testing.assert_array_equal(before["c_002.nii.gz"], after["c_002.nii.gz"])


# The predictor's hook


class Whole(torch.nn.Module):
    """Counts its calls and gives logits that depend on the place."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def predict_volume(self, image: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(image.shape))
        return torch.cat((image, image * torch.arange(image.shape[2]).view(-1, 1, 1)), 1)


@pytest.fixture
def predictor() -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    found = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=True, allow_tqdm=False)
    found.network, found.allowed_mirroring_axes = Whole(), None
    return found


def test_the_predictor_hands_over_the_whole_image(predictor: Any) -> None:
    image = torch.rand(1, 5, 6, 7)
    logits = predictor.predict_sliding_window_return_logits(image)
    assert predictor.network.shapes == [(1, 1, 5, 6, 7)]
    assert torch.equal(logits, Whole().predict_volume(image[None])[0])
    predictor.network = torch.nn.ModuleDict({"module": predictor.network})  # as inside DDP
    assert torch.equal(predictor.predict_sliding_window_return_logits(image), logits)


def test_mirrorings_are_averaged() -> None:
    image = torch.rand(1, 1, 5, 6, 7)
    flat = mirrored(Whole().predict_volume, image, (0, 2))
    ways = [Whole().predict_volume(image.flip(w) if w else image) for w in ((), (2,), (4,), (2, 4))]
    ways = [y.flip(w) if w else y for y, w in zip(ways, ((), (2,), (4,), (2, 4)), strict=True)]
    torch.testing.assert_close(flat, sum(ways) / 4)


def test_other_networks_are_predicted_as_ever(predictor: Any) -> None:
    class Plans:
        patch_size = (4, 4, 4)

    predictor.network, predictor.configuration_manager = torch.nn.Conv3d(1, 2, 1), Plans()
    predictor.label_manager = type("Labels", (), {"num_segmentation_heads": 2})()
    assert predictor.predict_sliding_window_return_logits(torch.rand(1, 6, 6, 6)).shape == (2, 6, 6, 6)


def test_prediction_is_the_networks_own_and_leaves_its_settings() -> None:
    net = CLSTMPlansUNet(2, 3, (2, 4), 2, True, norm=["instance", {"affine": True}]).eval()
    image = torch.rand(1, 2, 5, 9, 7)
    with torch.inference_mode():
        torch.testing.assert_close(net.predict_volume(image), net(image).half())
    assert not net.offload_to_cpu


# Plans


def plans(**changes: Any) -> dict[str, Any]:
    """As much of a plan as is read."""
    full = {"patch_size": [8, 8, 8], "batch_size": 2, "architecture": {"network_class_name": "stock"}, **changes}
    return {
        "configurations": {
            "3d_fullres": full,
            "3d_child": {"inherits_from": "3d_fullres"},
            "3d_grandchild": {"inherits_from": "3d_child"},
        }
    }


DEFAULTS = {name: getattr(CLSTMTrainer, name) for name in SETTINGS}


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_child", "3d_grandchild"])
def test_editing_twice_changes_nothing_and_the_plans_go_first(configuration: str) -> None:
    edited = plans(**{KEY: {"hidden_channels": 3}})
    edit_plans(edited, configuration, DEFAULTS)
    once = json.dumps(edited)
    edit_plans(edited, configuration, DEFAULTS)
    assert json.dumps(edited) == once
    found = edited["configurations"][configuration]
    assert found["architecture"]["arch_kwargs"]["hidden_channels"] == 3
    assert found["batch_size"] == 1
    CLSTMPlansUNet(1, 2, **{**found["architecture"]["arch_kwargs"], "channels": (2, 4)})


def test_bad_plans_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"works on volumes, .* \[8, 8\]: train 3d_fullres or 3d_lowres"):
        edit_plans(plans(patch_size=[8, 8]), "3d_fullres", DEFAULTS)
    with pytest.raises(ValueError, match="unknown setting 'hidden' under 'clstm_trainer'"):
        edit_plans(plans(**{KEY: {"hidden": 3}}), "3d_fullres", DEFAULTS)

"""nnU-Net's own commands with -tr SparseTrainer (shortened), from the raw images to a model shared as a zip file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from tests.nnunet_plugins.host import ROOT, Host, labels_of, write_dataset

pytestmark = pytest.mark.long

NAME = "Dataset901_Organs"
TRAINER = "ShortSparseTrainer"
PREDICT = ["-c", "3d_fullres", "-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta"]


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    """A planned and preprocessed dataset of three images, with a memory target that makes the stock patch small."""
    host = Host(tmp_path_factory.mktemp("nnunet"))
    dataset = write_dataset(host.raw, NAME, 3, (48, 44, 40))
    host.prepare(dataset, 901, "-gpu_memory_target", 0.05)
    host.split(NAME, ["c_000", "c_001"], ["c_002"])
    return host


def plans_of(host: Host) -> dict:
    """The stock plans."""
    return json.loads((host.preprocessed / NAME / "nnUNetPlans.json").read_text())


def test_from_training_to_a_shared_model(host, tmp_path):
    train = [901, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu"]
    host.run("nnUNetv2_train", *train)  # the console script itself, with nnU-Net's own worker processes
    model = host.results / NAME / f"{TRAINER}__nnUNetPlans__3d_fullres"
    summary = model / "fold_0" / "validation" / "summary.json"
    images, archive = host.raw / NAME / "imagesTs", tmp_path / "model.zip"
    options = ["-c", "3d_fullres", "-f", 0, "-tr", TRAINER, "--not_strict"]
    predict = ["nnUNetv2_predict", "-i", images, "-d", 901, "-tr", TRAINER, *PREDICT, "-o"]
    printed = host.run_in_one_process(["nnUNetv2_train", *train, "--c"], SHORT_EPOCHS="2")
    assert "Epoch 1" in printed
    assert "Epoch 0" not in printed
    summary.unlink()
    host.run_in_one_process(
        ["nnUNetv2_train", *train, "--val"],
        [*predict, tmp_path / "before"],
        ["nnUNetv2_export_model_to_zip", "-d", 901, "-o", archive, *options],
    )
    assert set(json.loads(summary.read_text())["mean"]) == {"1", "2"}

    stock = plans_of(host)["configurations"]["3d_fullres"]
    used = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]
    assert used["sparse_trainer"]["stock"]["patch_size"] == stock["patch_size"]
    assert np.prod(used["patch_size"]) > 2 * np.prod(stock["patch_size"])
    assert used["data_identifier"] == stock["data_identifier"]

    receiver = {"nnUNet_results": str(tmp_path / "received")}
    Path(receiver["nnUNet_results"]).mkdir()
    install = ["nnUNetv2_install_pretrained_model_from_zip", archive]
    host.run_in_one_process(install, [*predict, tmp_path / "after"], **receiver)
    before, after = labels_of(tmp_path / "before"), labels_of(tmp_path / "after")
    assert before.keys() == after.keys() == {"c_003.nii.gz"}
    for name in before:
        assert before[name].shape == (48, 44, 40)
        np.testing.assert_array_equal(before[name], after[name])


def test_plans_alone_switch_the_network_with_the_stock_trainer(host, tmp_path):
    page = (ROOT / "docs" / "howto" / "nnunet.md").read_text()
    fragment = json.loads(re.search(r"```json title=\"architecture\"\n(.*?)```", page, re.DOTALL).group(1))
    plans = {**plans_of(host), "plans_name": "SparsePlans"}
    configuration = plans["configurations"]["3d_fullres"]
    stock = configuration["architecture"]["arch_kwargs"]
    for name in ("strides", "features_per_stage"):  # what the page says to take over from the stock plan
        fragment["arch_kwargs"][name] = stock[name]
    fragment["arch_kwargs"] |= {"num_res_units": 0, "refine_channels": [8, 8, 8], "max_active": 0.2}
    configuration["architecture"] = fragment
    (host.preprocessed / NAME / "SparsePlans.json").write_text(json.dumps(plans))
    train = ["nnUNetv2_train", 901, "3d_fullres", 0, "-tr", "ShortStockTrainer", "-p", "SparsePlans", "-device", "cpu"]
    folders = ["-i", host.raw / NAME / "imagesTs", "-o", tmp_path / "out"]
    predict = ["nnUNetv2_predict", *folders, "-d", 901, "-tr", "ShortStockTrainer", "-p", "SparsePlans", *PREDICT]
    host.run_in_one_process(train, predict)
    assert labels_of(tmp_path / "out").keys() == {"c_003.nii.gz"}


def test_one_case_with_regions_and_an_ignore_label(tmp_path):
    host = Host(tmp_path / "nnunet")
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    changes = {"labels": labels, "regions_class_order": [1, 2], "ignored": 3, "spacing": (3.0, 1.0, 1.0)}
    dataset = write_dataset(host.raw, "Dataset902_Regions", 1, (12, 32, 28), **changes)
    host.prepare(dataset, 902, "-gpu_memory_target", 0.05)
    train = ["nnUNetv2_train", 902, "3d_fullres", "all", "-tr", TRAINER, "-device", "cuda"]
    options = ["-d", 902, "-tr", TRAINER, *PREDICT]
    options[options.index(0)], options[options.index("cpu")] = "all", "cuda"
    folders = ["-i", host.raw / dataset.name / "imagesTs", "-o", tmp_path / "out"]
    host.run_in_one_process(train, ["nnUNetv2_predict", *folders, *options])
    model = host.results / dataset.name / f"{TRAINER}__nnUNetPlans__3d_fullres"
    used = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]
    assert used["architecture"]["arch_kwargs"]["sigmoid"] is True
    assert used["architecture"]["arch_kwargs"]["strides"][1] == [1, 2, 2]  # anisotropic cells
    (predicted,) = labels_of(tmp_path / "out").values()
    assert set(np.unique(predicted)) <= {0, 1, 2}
    shutil.rmtree(host.folder)

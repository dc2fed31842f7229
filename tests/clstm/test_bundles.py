"""The cranial cavity bundle in two stages on generated heads, and the overlay on a stock bundle."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_net_in_out

from monai_memeff.apps.skull.phantom import HEAD_LABELS, head_phantom
from monai_memeff.clstm import CLSTMUNet
from monai_memeff.overlays import overlay_path
from tests.bundles.conftest import ROOT, as_scanned, command, flags, organ_data, read_nifti, run_here, save_nifti, stock  # noqa: F401

CAVITY = ROOT / "bundles" / "cranial_cavity_clstm"
CONFIGS = {path.stem: path for path in (CAVITY / "configs").glob("*.json")}
SMALL: dict[str, Any] = {"network_def#channels": [2, 3, 4], "shift": 2, "mean": -500.0, "std": 600.0}
SHORT: dict[str, Any] = {**SMALL, "val_interval": 2}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small heads with a labeled brain, tilted and with other axes than RAS, and one to segment."""
    folder = tmp_path_factory.mktemp("heads")
    for number in range(3):
        phantom = head_phantom(shape=(25, 29, 22), spacing=8.0, seed=number)
        image, affine = as_scanned(phantom, phantom.image.numpy().astype(np.int16))
        label, _ = as_scanned(phantom, (phantom.labels == HEAD_LABELS["brain"]).numpy().astype(np.uint8))
        part = "Ts" if number == 2 else "Tr"
        save_nifti(folder / f"images{part}" / f"head{number}.nii.gz", image, affine)
        if number < 2:
            save_nifti(folder / "labelsTr" / f"head{number}.nii.gz", label, affine)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundles") / CAVITY.name
    return Path(shutil.copytree(CAVITY, target, ignore=shutil.ignore_patterns("models", "eval")))


# Files


def test_the_network_is_that_of_the_metadata() -> None:
    small = {"network_def#channels": [2, 3, 4]}
    meta = str(CONFIGS["metadata"])
    verify_net_in_out("network_def", meta_file=meta, config_file=str(CONFIGS["inference"]), device="cpu", **small)


def test_train_and_inference_agree_and_follow_the_paper() -> None:
    train, inference, first = (json.loads(CONFIGS[n].read_text()) for n in ("train", "inference", "pretrain"))
    for key in ("network_def", "pixdim", "mean", "std"):
        assert train[key] == inference[key], key
    assert CLSTMUNet(**{k: v for k, v in train["network_def"].items() if k != "_target_"}).unet.last.out_channels == 4
    assert (train["iterations"], train["frozen_iterations"], train["val_interval"]) == (1500, 1000, 25)
    assert (train["learning_rate"], train["optimizer"]["momentum"]) == (1e-5, 0)
    assert (train["rotation_degrees"], train["shift"]) == (10, 20)
    assert (first["iterations"], first["optimizer"]["lr"], first["optimizer"]["momentum"]) == (1000, 0.01, 0.99)


# The recipe


def test_statistics_of_the_training_heads(heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here([CONFIGS["train"], CONFIGS["statistics"]], dataset_dir=str(heads))
    found = re.search(r"--mean (\S+) --std (\S+)", capsys.readouterr().out)
    values, _ = read_nifti(heads / "imagesTr" / "head0.nii.gz")  # head1 is for validation
    assert [float(number) for number in found.groups()] == pytest.approx([values.mean(), values.std()], abs=0.1)


@pytest.fixture(scope="module")
def pretrained(bundle: Path, heads: Path) -> Path:
    files = [bundle / "configs" / "train.json", bundle / "configs" / "pretrain.json"]
    run_here(files, bundle_root=str(bundle), dataset_dir=str(heads), **SHORT, iterations=2)
    return bundle


@pytest.fixture(scope="module")
def trained(pretrained: Path, heads: Path) -> Path:
    """Stage 2 from the command line; it begins with the weights of stage 1."""
    options = {**SHORT, "iterations": 4, "frozen_iterations": 2, "dataset_dir": heads}
    run = command(pretrained, "run", "--config_file", "configs/train.json", *flags(options))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert len(re.findall("train_loss: [0-9.]+", run.stdout)) == 4
    assert "val_dice" in run.stdout
    return pretrained


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)
    return state.get("model", state)


def test_stage_one_sees_single_slices(bundle: Path, heads: Path) -> None:
    work = ConfigWorkflow(
        config_file=[str(CONFIGS["train"]), str(CONFIGS["pretrain"])], meta_file=str(CONFIGS["metadata"]),
        logging_file=False, workflow_type="train", dataset_dir=str(heads), ckpt_dir=str(bundle / "none"), **SHORT,
    )  # fmt: skip
    work.initialize()
    sample = next(iter(work.parser.get_parsed_content("train#dataloader")))
    assert sample["image"].shape == sample["label"].shape
    assert sample["image"].shape[-1] == 1
    assert set(sample["label"].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.slow
def test_the_frozen_unet_keeps_stage_ones_weights(pretrained: Path, heads: Path, tmp_path: Path) -> None:
    (tmp_path / "pretrained.pt").write_bytes((pretrained / "models" / "pretrained.pt").read_bytes())
    run_here(
        [CONFIGS["train"]], dataset_dir=str(heads), ckpt_dir=str(tmp_path), **SHORT, iterations=2, learning_rate=0.01
    )
    before, after = weights(tmp_path / "pretrained.pt"), weights(tmp_path / "last_checkpoint_epoch=1.pt")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("unet.")} == {n for n in same if n.startswith("unet.")}
    assert "cell.conv.weight" not in same


@pytest.mark.slow
def test_after_the_frozen_iterations_everything_learns(trained: Path) -> None:
    before, after = (weights(trained / "models" / f"{n}.pt") for n in ("pretrained", "last_checkpoint_epoch=2"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"unet.encoder.0.first.conv.weight", "unet.last.weight", "cell.conv.weight"} <= changed


@pytest.mark.slow
def test_an_interrupted_training_goes_on(trained: Path, heads: Path, tmp_path: Path) -> None:
    """From the last checkpoint: iterations, optimizer and best score are remembered."""
    models = Path(shutil.copytree(trained / "models", tmp_path / "models"))
    options = {"frozen_iterations": 2, "iterations": 6, "resume": True}
    work = run_here([CONFIGS["train"]], dataset_dir=str(heads), ckpt_dir=str(models), **SHORT, **options)
    trainer = work.parser.get_parsed_content("train#trainer")
    assert (trainer.state.iteration, trainer.state.epoch) == (6, 3)
    state = torch.load(models / "last_checkpoint_epoch=3.pt", weights_only=True)
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {4, 6}  # the U-Net was frozen for two
    assert len(state["best"]["saved"] if "saved" in state["best"] else state["best"]["_saved"]) == 1
    with pytest.raises(SystemExit, match=r"nothing to resume: no last_checkpoint\*.pt in .*; start without --resume"):
        run_here([CONFIGS["train"]], dataset_dir=str(heads), ckpt_dir=str(tmp_path / "no"), **SHORT, resume=True)


def test_evaluation_writes_scores_and_a_picture(trained: Path, heads: Path, tmp_path: Path) -> None:
    files = [trained / "configs" / "train.json", trained / "configs" / "evaluate.json"]
    run_here(files, bundle_root=str(trained), dataset_dir=str(heads), output_dir=str(tmp_path), **SMALL)
    assert 0 <= float(re.split("[,\t]", (tmp_path / "metrics.csv").read_text().strip())[-1]) <= 1
    assert (tmp_path / "head1_pred.png").stat().st_size > 5000


def test_inference_keeps_the_geometry(trained: Path, heads: Path, tmp_path: Path) -> None:
    """At another spacing than the image's, so that the way back is walked too."""
    options = {"pixdim": [9.0, 9.0, 10.0], **{k: v for k, v in SMALL.items() if k != "shift"}}
    folders = {"bundle_root": str(trained), "dataset_dir": str(heads), "output_dir": str(tmp_path)}
    run_here([trained / "configs" / "inference.json"], "infer", **folders, **options)
    image, affine = read_nifti(heads / "imagesTs" / "head2.nii.gz")
    result, written = read_nifti(tmp_path / "head2" / "head2_cavity.nii.gz")
    assert result.shape == image.shape
    assert set(np.unique(result)) <= {0, 1}
    np.testing.assert_allclose(written, affine, atol=1e-4)


def test_an_empty_folder_ends_in_one_line(tmp_path: Path) -> None:
    for name, kind in (("train", "train"), ("inference", "infer")):
        with pytest.raises(SystemExit, match=r"no head: nothing in .*; set --dataset_dir"):
            run_here([CONFIGS[name]], kind, dataset_dir=str(tmp_path), ckpt_dir=str(tmp_path))


# The overlay


@pytest.mark.slow
def test_the_overlay_switches_a_stock_bundle(stock: Path, organ_data: Path, tmp_path: Path) -> None:  # noqa: F811
    small = {"network_def#channels": [4, 8], "network_def#hidden_channels": 2}
    folders = {"bundle_root": str(stock), "dataset_dir": str(organ_data), "ckpt_dir": str(tmp_path)}
    work = run_here([stock / "configs" / "train.json", overlay_path("clstm")], **folders, **small)
    assert type(work.network_def) is CLSTMUNet
    shutil.copy(tmp_path / "model.pt", (stock / "models").mkdir(exist_ok=True) or stock / "models" / "model.pt")
    folders = {"bundle_root": str(stock), "dataset_dir": str(organ_data), "output_dir": str(tmp_path)}
    run_here([stock / "configs" / "inference.json", overlay_path("clstm_inference")], "infer", **folders, **small)
    image, affine = read_nifti(organ_data / "imagesTs" / "new.nii.gz")
    result, written = read_nifti(tmp_path / "new" / "new_trans.nii.gz")
    assert result.shape == image.shape
    np.testing.assert_allclose(written, affine, atol=1e-4)

"""Overlays on a stock bundle: data x spatial training under torchrun, and streamed inference with its weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.memory import measure_peak
from monai_memeff.overlays import overlay_path
from tests.bundles.conftest import ROOT, command, organ_data, read_nifti, stock  # noqa: F401


def torchrun(folder: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``torchrun -m monai.bundle ...`` on the CPU, as a user types it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*run, "-m", "monai.bundle", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def listed(*files: str | Path) -> str:
    """Configuration files as the bundle command takes them."""
    return "[" + ", ".join(f"'{f}'" for f in files) + "]"


def written(folder: Path, name: str, content: dict) -> Path:
    """An overlay in a file."""
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.fixture(scope="module")
def densely_trained(stock: Path, organ_data: Path) -> dict[str, torch.Tensor]:  # noqa: F811
    """Weights of the stock bundle, trained as it is, also left where it looks for them."""
    seed = written(stock, "seed.json", {"+initialize": ["$monai.utils.set_determinism(seed=0)"]})
    run = command(stock, "run", "--config_file", listed("configs/train.json", seed), "--dataset_dir", str(organ_data))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return torch.load(stock / "models" / "model.pt", weights_only=True)


@pytest.mark.exhaustive
def test_an_overlay_trains_in_parts_like_the_stock_bundle(
    stock: Path,  # noqa: F811
    organ_data: Path,  # noqa: F811
    densely_trained: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    files = listed("configs/train.json", overlay_path("halo"))
    where = ["--dataset_dir", str(organ_data), "--ckpt_dir", str(tmp_path), "--halo_spatial", "[2]"]
    run = torchrun(stock, 2, "run", "--config_file", files, *where)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    parts = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(densely_trained) == list(parts)
    for key, value in densely_trained.items():  # Adam's first steps turn rounding into fractions of its rate, 1e-3
        torch.testing.assert_close(parts[key], value, atol=2e-3, rtol=1e-3, msg=key)


@pytest.mark.exhaustive
def test_a_training_in_parts_goes_on_as_if_nobody_had_interrupted_it(organ_data: Path, tmp_path: Path) -> None:  # noqa: F811
    files = listed("configs/train.json", overlay_path("halo"))
    size = ["--side", "16", "--features", "[2, 4]", "--convs", "1", "--val_count", "1"]
    for folder, *options in (("whole", "3"), ("out", "1"), ("out", "3", "--resume", "True")):
        where = ["--dataset_dir", str(organ_data), "--ckpt_dir", str(tmp_path / folder), "--max_epochs", *options]
        run = torchrun(ROOT / "bundles" / "liver_tumor_halo", 2, "run", "--config_file", files, *where, *size)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    ours, theirs = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("out", "whole"))
    for name in ("model", "optimizer", "scheduler"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


# 128 x 48 x 48 voxels: eight parts at multiples of the network's stride 16, with the logits written out as well
FINE = {
    "preprocessing#transforms#3#pixdim": [2.84, 8.0, 10.0],
    "+preprocessing#transforms": [{"_target_": "DivisiblePadd", "keys": "image", "k": 16}],
    "postprocessing#transforms#0": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_postfix": "logits"},
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        ],
    },
}


@pytest.mark.exhaustive
def test_an_overlay_streams_a_densely_trained_model_to_the_same_image(
    stock: Path,  # noqa: F811
    organ_data: Path,  # noqa: F811
    densely_trained: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    fine = written(tmp_path, "fine.json", FINE)
    plain = written(tmp_path, "whole.json", {"inferer": {"_target_": "SimpleInferer"}})
    images, logits = [], []
    for name, inferer in (("whole", plain), ("parts", overlay_path("halo_inference"))):
        files = listed("configs/inference.json", fine, inferer)
        where = ["--dataset_dir", str(organ_data), "--output_dir", str(tmp_path / name)]
        run = command(stock, "run", "--config_file", files, *where)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        images.append(read_nifti(next((tmp_path / name).rglob("*_trans.nii.gz"))))
        logits.append(read_nifti(next((tmp_path / name).rglob("*_logits.nii.gz")))[0])
    assert logits[0].shape[0] >= 128
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5, rtol=0)
    assert np.abs(logits[0]).max() > 0.1
    np.testing.assert_array_equal(images[1][1], images[0][1])
    assert (images[1][0] != images[0][0]).sum() <= 2  # a tie may fall either way
    assert len(np.unique(images[0][0])) == 2


@pytest.mark.slow
def test_eight_parts_of_the_stock_network_need_a_sixth(stock: Path, tmp_path: Path) -> None:  # noqa: F811
    config = ConfigParser()
    config.read_config(str(stock / "configs" / "inference.json"))
    network, x = config.get_parsed_content("network_def").eval(), torch.randn(1, 1, 128, 48, 48)
    with torch.no_grad(), measure_peak("cpu") as ordinary:
        network(x)
    inferer = SpatialPartitionInferer(8, store=tmp_path)
    with measure_peak("cpu") as streamed:
        inferer(x, network)
    assert inferer.last_report is not None
    assert 6 * inferer.last_report.device_peak_bytes <= ordinary.peak_bytes
    assert 6 * streamed.peak_bytes <= ordinary.peak_bytes

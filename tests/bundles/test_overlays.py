"""One overlay file and nothing else switches a stock segmentation bundle from MONAI's UNet to SparseUNet."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from monai.networks.nets import UNet

from monai_memeff.overlays import overlay_names, overlay_path
from monai_memeff.sparse import SparseInferer, SparseUNet
from tests.bundles.conftest import ROOT, command, read_nifti, run_here


@pytest.fixture(scope="module")
def dense_weights(stock: Path, organ_data: Path) -> Path:
    """``models/model.pt`` as the unmodified bundle trains it."""
    run_here([stock / "configs" / "train.json"], bundle_root=str(stock), dataset_dir=str(organ_data))
    return stock / "models" / "model.pt"


def parser(*files: Path) -> ConfigParser:
    """The configuration that these files give together."""
    config = ConfigParser()
    config.read_config([str(f) for f in files])
    return config


# The files


def test_an_overlay_is_found_by_name() -> None:
    assert {"sparse_unet", "sparse_unet_inference"} <= set(overlay_names())
    for name in overlay_names():
        assert json.loads(overlay_path(name).read_text())
        assert overlay_path(f"{name}.json") == overlay_path(name)


@pytest.mark.parametrize("name", ["unet", "", "../sparse_unet"])
def test_another_name_is_refused_with_the_choice(name: str) -> None:
    with pytest.raises(ValueError, match=r"no overlay is called .*: choose one of .*sparse_unet, sparse_unet_infer"):
        overlay_path(name)


def test_the_wheel_holds_the_overlays(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling comes with the extra [test]")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"monai_memeff/overlays/{name}.json" for name in overlay_names()} <= set(names)


# Training


@pytest.mark.slow
def test_the_stock_bundle_trains_sparse(stock: Path, organ_data: Path, dense_weights: Path, tmp_path: Path) -> None:
    files = f"['configs/train.json', '{overlay_path('sparse_unet')}']"
    folders = ["--dataset_dir", str(organ_data), "--ckpt_dir", str(tmp_path)]
    run = command(stock, "run", "--config_file", files, *folders)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    sparse, dense = (torch.load(path, weights_only=True) for path in (tmp_path / "model.pt", dense_weights))
    assert {k: v.shape for k, v in sparse.items()} == {k: v.shape for k, v in dense.items()}
    assert any(not torch.equal(sparse[k], dense[k]) for k in dense)


@pytest.mark.slow
def test_the_stock_bundle_evaluates_sparse(stock: Path, organ_data: Path, dense_weights: Path, tmp_path: Path) -> None:
    """The bundle's own evaluate.json, on top of the overlay, restores the dense weights strictly and scores."""
    files = [stock / "configs" / "train.json", overlay_path("sparse_unet"), stock / "configs" / "evaluate.json"]
    folders = {"bundle_root": str(stock), "dataset_dir": str(organ_data), "output_dir": str(tmp_path)}
    work = run_here(files, **folders)
    assert type(work.network_def) is SparseUNet
    name, score = re.split("[,\t]", (tmp_path / "metrics.csv").read_text().strip())
    assert name == "val_mean_dice"
    assert 0 <= float(score) <= 1


def test_the_overlay_comes_after_the_bundles_file_and_before_its_other_overlays(stock: Path) -> None:
    train, several = stock / "configs" / "train.json", stock / "configs" / "multi_gpu_train.json"
    ours = overlay_path("sparse_unet")
    for order, kind in (
        ((train, ours), SparseUNet),
        ((train, ours, several), SparseUNet),
        ((train, several, ours), SparseUNet),
        ((train,), UNet),
    ):
        config = parser(*order)
        assert type(config.get_parsed_content("network_def")) is kind
        data_parallel = several in order
        assert ("DistributedDataParallel" in str(config["network"])) == data_parallel
    with pytest.raises(KeyError, match="network_def"):
        parser(ours, train)


# Inference


def test_dense_weights_run_sparse_and_keep_the_images_geometry(
    stock: Path, organ_data: Path, dense_weights: Path, tmp_path: Path
) -> None:
    files = f"['configs/inference.json', '{overlay_path('sparse_unet_inference')}']"
    folders = ["--dataset_dir", str(organ_data), "--output_dir", str(tmp_path)]
    run = command(stock, "run", "--config_file", files, *folders)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    image, affine = read_nifti(organ_data / "imagesTs" / "new.nii.gz")
    result, written = read_nifti(tmp_path / "new" / "new_trans.nii.gz")
    assert result.shape == image.shape
    np.testing.assert_allclose(written, affine, atol=1e-4)
    assert set(np.unique(result)) <= {0, 1}


def test_every_voxel_active_gives_the_dense_answer(stock: Path, dense_weights: Path) -> None:
    config = stock / "configs" / "inference.json"
    weights = torch.load(dense_weights, weights_only=True)
    dense = parser(config).get_parsed_content("network_def")
    switched = parser(config, overlay_path("sparse_unet_inference"))
    sparse = switched.get_parsed_content("network_def")
    assert type(switched.get_parsed_content("inferer")) is SparseInferer
    for network in (dense, sparse):
        network.load_state_dict(weights, strict=True)
        network.eval()
    volume = torch.rand(1, 1, 32, 32, 32) + 0.01
    with torch.no_grad():
        torch.testing.assert_close(sparse(volume), dense(volume), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sparse_unet", "sparse_unet_inference"])
def test_verify_net_in_out(stock: Path, name: str) -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(stock / "configs" / "metadata.json"),
        config_file=[str(stock / "configs" / "inference.json"), str(overlay_path(name))],
        device="cpu",
        **{"network_def#require_weights": False},
    )

"""The organ bundle: files, training, scoring, segmentations in place; and the overlay that switches a stock bundle."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import verify_net_in_out

from monai_memeff.occupancy import OccupancyNet, OctreeInferer
from monai_memeff.overlays import overlay_path
from tests.bundles.conftest import ROOT, command, read_nifti, run_here, save_nifti

ORGANS = ROOT / "bundles" / "organ_occupancy"
TRAIN, INFERENCE, EVALUATE = (ORGANS / "configs" / f"{name}.json" for name in ("train", "inference", "evaluate"))
COARSE = {"pixdim": [10.0, 10.0, 10.0], "network_def#channels": [4, 8], "organs": ["liver"]}
SHORT = {"points": 4096, "max_epochs": 18, "val_interval": 18, "learning_rate": 0.02}


# Files


def test_metadata_names_the_organs() -> None:
    metadata = json.loads((ORGANS / "configs" / "metadata.json").read_text())
    classes = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert [classes[str(n)] for n in range(6)] == ["background", *json.loads(TRAIN.read_text())["organs"]]


def test_train_and_inference_agree() -> None:
    """Said in two files, for MONAI Label and Deploy read them apart."""
    train, inference = json.loads(TRAIN.read_text()), json.loads(INFERENCE.read_text())
    for key in ("network_def", "organs", "pixdim", "window", "points_per_pass", "initial"):
        assert train[key] == inference[key], key
    assert train["validate"]["inferer"] == inference["inferer"]
    ours = {t["_target_"]: t for t in train["train"]["deterministic_transforms"]}
    for transform in inference["preprocessing"]["transforms"]:
        same = ours[transform["_target_"]]
        for key in set(transform) - {"keys", "mode", "func"}:
            assert transform[key] == same[key], (transform["_target_"], key)


def test_verify_net_in_out() -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(ORGANS / "configs" / "metadata.json"),
        config_file=str(INFERENCE),
        device="cpu",
        p=2,
        n=8,
        any=16,
    )


# Programs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, organ_data: Path) -> Path:
    """A copy of the bundle, trained on two bodies and scored on a third by the command line."""
    bundle = tmp_path_factory.mktemp("bundles") / ORGANS.name
    shutil.copytree(ORGANS, bundle, ignore=shutil.ignore_patterns("models", "eval"))
    options = [part for key, value in {**COARSE, **SHORT}.items() for part in (f"--{key}", str(value))]
    folders = ["--dataset_dir", str(organ_data)]
    run = command(bundle, "run", "--config_file", "configs/train.json", *folders, *options)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return bundle


def test_it_learns_and_is_scored_by_voxels_and_by_points(trained: Path, organ_data: Path) -> None:
    """The same weights twice: the published score is another number than Dice of all voxels."""
    folders = {"bundle_root": str(trained), "dataset_dir": str(organ_data)}
    files = [trained / "configs" / name for name in ("train.json", "evaluate.json")]
    run_here(files, **folders, **COARSE)
    rows = [re.split("[,\t]", line) for line in (trained / "eval" / "metrics.csv").read_text().split("\n") if line]
    scores = {name: float(value) for name, value in rows}
    assert scores["mean_dice"] > 0.4
    assert 0 < scores["sampled_dice"] < 1
    assert scores["sampled_dice"] != scores["mean_dice"]


def test_it_segments_in_the_images_own_geometry(trained: Path, organ_data: Path, tmp_path: Path) -> None:
    folders = {"bundle_root": str(trained), "dataset_dir": str(organ_data / "imagesTs"), "output_dir": str(tmp_path)}
    work = run_here([trained / "configs" / "inference.json"], "infer", **folders, **COARSE)
    assert work.inferer.last_report.num_queries < 0.7 * work.inferer.last_report.voxels
    image, affine = read_nifti(organ_data / "imagesTs" / "new.nii.gz")
    result, written = read_nifti(tmp_path / "new" / "new_organs.nii.gz")
    assert result.shape == image.shape
    np.testing.assert_allclose(written, affine, atol=1e-4)
    assert set(np.unique(result)) == {0, 1}


def test_an_empty_folder_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"in pairs, found 0 in imagesTr and 0 in labelsTr of .*; set --dataset_dir"):
        run_here([TRAIN], dataset_dir=str(tmp_path))
    with pytest.raises(SystemExit, match=r"no image: nothing matches .*; set --dataset_dir and --pattern"):
        run_here([INFERENCE], "infer", dataset_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("value", "label", "message"),
    [(np.nan, 1, r"with 1 values that are not finite; one finite 3D"), (0, 4, r"labels from 0 to 4, 0 to 1 are named")],
    ids=["NaN", "unnamed label"],
)
def test_a_volume_it_cannot_use_ends_in_one_line(value: float, label: int, message: str, tmp_path: Path) -> None:
    image, labels = np.zeros((20, 20, 20), dtype=np.float32), np.zeros((20, 20, 20), dtype=np.uint8)
    image[3, 3, 3], labels[5:9, 5:9, 5:9] = value, label
    for part, values in (("imagesTr", image), ("labelsTr", labels)):
        save_nifti(tmp_path / part / "patient.nii.gz", values, np.diag([8.0, 8.0, 8.0, 1.0]))
    with pytest.raises(RuntimeError) as caught:
        run_here([TRAIN], dataset_dir=str(tmp_path), ckpt_dir=str(tmp_path), **COARSE, **SHORT)
    first: BaseException = caught.value
    while first.__cause__ is not None:
        first = first.__cause__
    assert isinstance(first, ValueError)
    assert re.search(message, str(first))
    assert "\n" not in str(first)


# The overlay

OVERLAY = {"network_def#channels": [4, 8], "occupancy_points": 4096}


@pytest.mark.slow
def test_the_overlay_trains_and_scores_a_stock_bundle(stock: Path, organ_data: Path, tmp_path: Path) -> None:
    folders = {"bundle_root": str(stock), "dataset_dir": str(organ_data), "ckpt_dir": str(tmp_path)}
    files = [stock / "configs" / "train.json", overlay_path("occupancy")]
    work = run_here(files, **folders, **OVERLAY)
    assert type(work.network_def) is OccupancyNet
    assert type(work.evaluator.inferer) is OctreeInferer
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert weights.keys() == work.network_def.state_dict().keys()


def test_the_overlay_segments_with_a_stock_bundle(stock: Path, organ_data: Path, tmp_path: Path) -> None:
    network = OccupancyNet(1, 2, variant="interpolated", channels=(4, 8))
    (stock / "models").mkdir(exist_ok=True)
    torch.save(network.state_dict(), stock / "models" / "model.pt")
    folders = {"bundle_root": str(stock), "dataset_dir": str(organ_data), "output_dir": str(tmp_path)}
    files = [stock / "configs" / "inference.json", overlay_path("occupancy_inference")]
    run_here(files, "infer", **folders, **{"network_def#channels": [4, 8]})
    image, affine = read_nifti(organ_data / "imagesTs" / "new.nii.gz")
    result, written = read_nifti(tmp_path / "new" / "new_trans.nii.gz")
    assert result.shape == image.shape
    np.testing.assert_allclose(written, affine, atol=1e-4)

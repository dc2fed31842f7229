"""The super-resolution bundle: files, training, scoring, both ways to a fine mask, geometry, input it cannot use."""

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

from tests.body_phantom import body_phantom
from tests.bundles.conftest import ROOT, as_scanned, command, flags, read_nifti, run_here, save_nifti

BUNDLE = ROOT / "bundles" / "organ_superresolution_sparse"
TRAIN, DENSE, INFERENCE, EVALUATE = (
    BUNDLE / "configs" / f"{name}.json" for name in ("train", "train_dense", "inference", "evaluate")
)
CELLS = {"coarse_size": [13, 11, 12]}  # of the trunks of 52 x 44 x 48 voxels: 4 voxels an edge
FINE_NET = {"network_def#channels": [4, 4, 4, 4, 8, 8, 8]}
DENSE_NET = {"dense_network_def#channels": [4, 8], "dense_network_def#strides": [1]}


# Files


def test_the_programs_agree() -> None:
    """Networks, coarse grid and what the dense network sees are said in several files: hosts read them apart."""
    train, dense, inference = (json.loads(path.read_text()) for path in (TRAIN, DENSE, INFERENCE))
    for key in ("network_def", "place", "use_checkpoint", "max_voxels", "coarse_size", "seed"):
        assert train[key] == inference[key], key
    for key in ("dense_network_def", "window", "coarse_size"):
        assert dense[key] == inference[key], key
    assert train["coarse_mode"] == dense["coarse_mode"]
    assert "RandSegmentationErrorsd" not in str(train["validate"])
    seen = {"ScaleIntensityRanged", "Resized"}
    steps = [
        [
            {k: v for k, v in t.items() if k not in ("keys", "_disabled_")}
            for t in transforms
            if t["_target_"].rpartition(".")[2] in seen
        ]
        for transforms in (dense["train"]["deterministic_transforms"], inference["preprocessing"]["transforms"])
    ]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 2


def test_verify_net_in_out() -> None:
    options: dict[str, Any] = {"p": 2, "n": 8, "any": 64}
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(BUNDLE / "configs" / "metadata.json"),
        config_file=str(INFERENCE),
        device="cpu",
        **options,
        **FINE_NET,
    )


@pytest.mark.parametrize(("file", "kind"), [(TRAIN, "train"), (INFERENCE, "infer")], ids=["train", "inference"])
def test_monai_finds_the_properties_it_asks_for(file: Path, kind: str, organ_data: Path) -> None:
    work = ConfigWorkflow(
        config_file=str(file),
        meta_file=str(BUNDLE / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        dataset_dir=str(organ_data if kind == "train" else organ_data / "imagesTs"),
        initialize=[],
        **FINE_NET,
    )
    work.initialize()
    assert not work.check_properties()


# Input it cannot use


def test_an_empty_folder_ends_in_one_line(tmp_path: Path, organ_data: Path) -> None:
    with pytest.raises(SystemExit, match=r"no segmentation: nothing matches .*labelsTr.*; set --dataset_dir"):
        run_here([TRAIN], dataset_dir=str(tmp_path))
    with pytest.raises(SystemExit, match=r"in pairs, found 0 in imagesTr and 0 in labelsTr of .*; set --dataset_dir"):
        run_here([DENSE], dataset_dir=str(tmp_path))
    with pytest.raises(SystemExit, match=r"no image: nothing matches .*; set --dataset_dir and --pattern"):
        run_here([INFERENCE], "infer", dataset_dir=str(tmp_path))
    with pytest.raises(SystemExit, match=r"no coarse mask of the name new.nii.gz in .*, 1 of 1 images have none"):
        run_here([INFERENCE], "infer", dataset_dir=str(organ_data / "imagesTs"), coarse_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("label", r"case1.nii.gz holds no voxel of the structure: label 9; set --label, or leave the file out"),
        ("4d", r"patient.nii.gz holds 2 volumes, and one is needed: split the 4D image"),
    ],
)
def test_a_file_it_cannot_use_ends_in_one_line(change: str, message: str, organ_data: Path, tmp_path: Path) -> None:
    if change == "4d":
        values = np.ones((20, 20, 10, 2), dtype=np.uint8)
        save_nifti(tmp_path / "labelsTr" / "patient.nii.gz", values, np.eye(4))
    folder = organ_data if change == "label" else tmp_path
    with pytest.raises(RuntimeError) as caught:
        run_here([TRAIN], dataset_dir=str(folder), ckpt_dir=str(tmp_path), label=9, **CELLS, **FINE_NET)
    first: BaseException = caught.value
    while first.__cause__ is not None:
        first = first.__cause__
    assert isinstance(first, ValueError)
    assert re.search(message, str(first))
    assert "\n" not in str(first)


@pytest.mark.parametrize("noise", [0, 1])
def test_training_sees_the_errors_it_is_told_to(noise: int, organ_data: Path) -> None:
    """Without errors a coarse mask covers its fine one; with them it does not always, and the target stays."""
    work = ConfigWorkflow(
        config_file=str(TRAIN), logging_file=False, workflow_type="train", dataset_dir=str(organ_data)
    )
    work.parser.update({"coarse_noise": noise, "flip_axes": [], **CELLS})
    items = [work.parser.get_parsed_content("train#dataset")[0] for _ in range(4)]
    given, wanted = (
        [{tuple(row) for row in item[key].tolist()} for item in items] for key in ("coords", "target_coords")
    )
    assert all(target == wanted[0] for target in wanted)
    assert all(target <= coarse for target, coarse in zip(wanted, given, strict=True)) == (noise == 0)


# Programs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, organ_data: Path) -> Path:
    """A copy of the bundle with both stages trained on two trunks and scored on a third, from the command line."""
    bundle = tmp_path_factory.mktemp("bundles") / BUNDLE.name
    shutil.copytree(BUNDLE, bundle, ignore=shutil.ignore_patterns("models", "eval"))
    short = {"dataset_dir": organ_data, "batch_size": 2, **CELLS}
    for file, options in (
        ("train", {**FINE_NET, "max_epochs": 50, "val_interval": 25, "use_checkpoint": True, "learning_rate": 0.02}),
        ("train_dense", {**DENSE_NET, "max_epochs": 50, "val_interval": 25, "learning_rate": 0.02}),
    ):
        run = command(bundle, "run", "--config_file", f"configs/{file}.json", *flags({**short, **options}))
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return bundle


def scores(path: Path) -> dict[str, float]:
    """What the evaluation wrote."""
    rows = [re.split("[,\t]", line) for line in path.read_text().split("\n") if line]
    return {name: float(value) for name, value in rows}


def test_it_learns_more_than_interpolation_knows(trained: Path, organ_data: Path) -> None:
    files = [trained / "configs" / "train.json", trained / "configs" / "evaluate.json"]
    run_here(files, bundle_root=str(trained), dataset_dir=str(organ_data), **CELLS, **FINE_NET)
    found = scores(trained / "eval" / "metrics.csv")
    assert found["dice"] > found["trilinear_dice"] + 0.05
    assert 0 < found["hd95_mm"] < 30
    assert "case0" in (trained / "eval" / "dice_raw.csv").read_text()


@pytest.mark.slow
def test_training_goes_on_from_the_last_state(trained: Path, organ_data: Path, tmp_path: Path) -> None:
    """To the number of epochs that are asked for, with the learning rate of the next one; the best score is known."""
    shutil.copy(trained / "models" / "last.pt", tmp_path / "last.pt")
    before = torch.load(tmp_path / "last.pt", weights_only=True)
    epochs = before["scheduler"]["last_epoch"]
    options = {"dataset_dir": str(organ_data), "ckpt_dir": str(tmp_path), "resume": True, **CELLS, **FINE_NET}
    run_here([TRAIN], max_epochs=epochs + 1, **options)
    after = torch.load(tmp_path / "last.pt", weights_only=True)
    steps = [float(state["optimizer"]["state"][0]["step"]) for state in (before, after)]
    assert steps[1] - steps[0] == after["trainer"]["epoch_length"]
    assert after["scheduler"]["last_epoch"] == before["scheduler"]["last_epoch"] + 1
    assert after["best"] == before["best"]
    run_here([TRAIN], max_epochs=epochs + 1, **options)  # it is done already
    again = torch.load(tmp_path / "last.pt", weights_only=True)
    assert again["scheduler"] == after["scheduler"]


@pytest.mark.slow
def test_two_stages_end_in_the_images_own_geometry(trained: Path, organ_data: Path, tmp_path: Path) -> None:
    """A CT goes in, a mask on its grid comes out, and it is the organ: the phantom knows where that is."""
    found = inferred(trained, organ_data, tmp_path, **CELLS, **FINE_NET, **DENSE_NET)
    assert set(np.unique(found)) == {0, 1}
    assert dice_of(found > 0) > 0.4
    nothing = inferred(trained, organ_data, tmp_path, dense_level=1e9, **CELLS, **FINE_NET, **DENSE_NET)
    assert not nothing.any()


def test_coarse_masks_of_ones_own(trained: Path, organ_data: Path, tmp_path: Path) -> None:
    """No first stage: the masks lie on a grid of their own, with other axes and another label."""
    liver, affine = true_liver()
    wide = liver[::-1][:52, :44, :48].reshape(13, 4, 11, 4, 12, 4).any(axis=(1, 3, 5)).astype(np.uint8) * 7
    turn = np.eye(4)
    turn[0, 0], turn[0, 3] = -1, liver.shape[0] - 1
    step = np.diag([4.0, 4.0, 4.0, 1.0])
    step[:3, 3] = 1.5
    save_nifti(tmp_path / "coarse" / "new.nii.gz", wide, affine @ turn @ step)
    options = {"coarse_dir": str(tmp_path / "coarse"), "label": 7, "components": 1, **FINE_NET}
    weights = shutil.copytree(trained / "models", tmp_path / "models", ignore=shutil.ignore_patterns("dense*"))
    found = inferred(trained, organ_data, tmp_path, ckpt_dir=str(weights), **options)
    assert found.max() == 1
    nearest = wide.repeat(4, 0).repeat(4, 1).repeat(4, 2)[::-1] > 0
    assert dice_of(found > 0) > dice_of(nearest) + 0.1


def inferred(trained: Path, data: Path, output: Path, **options: Any) -> np.ndarray:
    """The mask that the bundle writes for the trunk in imagesTs, whose geometry must be the image's."""
    folders = {"bundle_root": str(trained), "dataset_dir": str(data / "imagesTs"), "output_dir": str(output)}
    run_here([trained / "configs" / "inference.json"], "infer", **folders, **options)
    image, affine = read_nifti(data / "imagesTs" / "new.nii.gz")
    found, written = read_nifti(output / "new" / "new_fine.nii.gz")
    assert found.shape == image.shape
    assert found.dtype == np.uint8
    np.testing.assert_allclose(written, affine, atol=1e-4)
    return found


def true_liver() -> tuple[np.ndarray, np.ndarray]:
    """The liver of the trunk in imagesTs, and the affine."""
    from tests.body_phantom import BODY_LABELS

    phantom = body_phantom(shape=(52, 44, 48), spacing=(7.0, 7.0, 9.0), seed=3)
    return as_scanned(phantom, (phantom.labels == BODY_LABELS["liver"]).numpy())


def dice_of(found: np.ndarray) -> float:
    """Dice with the liver that the phantom knows."""
    liver, _ = true_liver()
    return 2 * float((liver & found).sum()) / float(liver.sum() + found.sum())


@pytest.mark.slow
def test_two_stages_on_a_grid_of_512_x_512_x_20(trained: Path, tmp_path: Path) -> None:
    """The published workflow in size: a dense network on a coarse grid, a sparse one on the CT's own."""
    image = np.full((512, 512, 20), -100, dtype=np.int16)
    image[180:300, 200:290, 4:16] = 60
    save_nifti(tmp_path / "in" / "large.nii.gz", image, np.diag([-0.8, 0.8, 2.0, 1.0]))
    options = {"coarse_size": [64, 64, 10], **FINE_NET, **DENSE_NET}
    folders = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path), "bundle_root": str(trained)}
    work = run_here([trained / "configs" / "inference.json"], "infer", **folders, **options)
    found, affine = read_nifti(tmp_path / "large" / "large_fine.nii.gz")
    assert found.shape == image.shape
    np.testing.assert_allclose(affine, np.diag([-0.8, 0.8, 2.0, 1.0]), atol=1e-5)
    assert work.evaluator.state.batch[0]["image"].shape == (1, 512, 512, 20)
    assert found.max() <= 1

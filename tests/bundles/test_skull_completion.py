"""The skull completion bundle: files, preprocessing against plain numpy, training, scoring, implants in place."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor

from tests.bundles.conftest import SKULL, command, flags, read_nifti, run_here, save_nifti

SMALL = {"grid": 64, "cell_mm": 4.0, "pool": 2}
TINY = {"network_def#channels": [2, 2, 2, 2, 4, 4, 4], "val_defects": 2, "val_interval": 1, "shift": 2}
TRAIN, INFERENCE, EVALUATE = (SKULL / "configs" / f"{name}.json" for name in ("train", "inference", "evaluate"))


# Files


def test_train_and_inference_agree() -> None:
    """One grid, one network, one way onto the grid: said in two files, for MONAI Label and Deploy read them apart."""
    train, inference = json.loads(TRAIN.read_text()), json.loads(INFERENCE.read_text())
    for key in ("network_def", "bone_threshold", "components", "grid", "cell_mm", "pool", "headroom_mm", "seed"):
        assert train[key] == inference[key], key
    ours = json.loads(json.dumps(train["train"]["deterministic_transforms"]).replace('"skull"', '"image"'))
    theirs = [t for t in inference["preprocessing"]["transforms"] if t["keys"] == "image"]
    assert ours == [t for t in theirs if "CopyItemsd" not in t["_target_"]]


def test_verify_net_in_out() -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(SKULL / "configs" / "metadata.json"),
        config_file=str(INFERENCE),
        device="cpu",
        **{"network_def#channels": [2, 2, 2, 2, 2, 2, 2]},
    )


def test_an_empty_folder_ends_in_one_line(tmp_path: Path) -> None:
    for file, kind in ((TRAIN, "train"), (INFERENCE, "infer")):
        with pytest.raises(SystemExit, match=r"no skull: nothing matches .*; set --dataset_dir and --pattern"):
            run_here([file], kind, dataset_dir=str(tmp_path))


@pytest.mark.parametrize(("file", "kind"), [(TRAIN, "train"), (INFERENCE, "infer")], ids=["train", "inference"])
@pytest.mark.parametrize(
    ("change", "threshold", "message"),
    [
        (None, 5000, r"patient.nii.gz: 0\.0% of the voxels are bone at the threshold 5000, more than 0 .* change"),
        (None, -2000, r"patient.nii.gz: 100\.0% of the voxels are bone at the threshold -2000, .* less than 50% must"),
        (
            "nan",
            300,
            r"patient.nii.gz has the shape \(1, 20, 20, 20\) with 1 values that are not finite; one ",
        ),
        ("4d", 300, r"patient.nii.gz holds 2 volumes, and one is needed: split the 4D image"),
    ],
    ids=["no bone", "all bone", "NaN", "4D"],
)
@pytest.mark.slow
def test_a_volume_it_cannot_use_ends_in_one_line(
    file: Path, kind: str, change: str | None, threshold: int, message: str, tmp_path: Path
) -> None:
    values = np.zeros((20, 20, 20), dtype=np.float32)
    values[5:9, 5:9, 5:9] = 1000
    if change == "nan":
        values[3, 3, 3] = np.nan
    if change == "4d":
        values = values.reshape(20, 20, 10, 2)
    save_nifti(tmp_path / "in" / "patient.nii.gz", values, np.diag([8.0, 8.0, 8.0, 1.0]))
    options = {"bone_threshold": threshold, **SMALL, **(TINY if kind == "train" else {"initialize": []})}
    folders = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path)}
    with pytest.raises(RuntimeError) as caught:
        run_here([file], kind, **options, **folders)
    first: BaseException = caught.value
    while first.__cause__ is not None:
        first = first.__cause__
    assert isinstance(first, ValueError)
    assert re.search(message, str(first))
    assert "\n" not in str(first)
    assert not (tmp_path / "out").exists()


# The way onto the grid


def config(path: Path, **changes: Any) -> ConfigParser:
    """A configuration with changes."""
    parser = ConfigParser()
    parser.read_config(str(path))
    parser.update(changes)
    return parser


@pytest.mark.parametrize("pool", [1, 2, 3, 4])
def test_a_cell_is_bone_where_any_of_its_voxels_is(pool: int, heads: Path) -> None:
    """Cropping, hanging from the top and pooling, against plain numpy on the volume that comes before them."""
    grid, cell = 48, 6.0
    parser = config(TRAIN, dataset_dir=str(heads), grid=grid, cell_mm=cell, pool=pool)
    steps = parser.get_parsed_content("train#deterministic_transforms")
    parts = {type(step).__name__: number for number, step in enumerate(steps)}
    data: Any = {"skull": str(heads / "head0.nii.gz")}
    for number, step in enumerate(steps):
        data = step(data)
        if number == parts["CropForegroundd"] - 1:
            bone = data["skull"][0].numpy() > 0
    skull = data["skull"]
    assert skull.shape == (1, grid, grid, grid)
    np.testing.assert_allclose(np.linalg.norm(skull.affine.numpy()[:3, :3], axis=0), cell, rtol=1e-5)
    assert np.array_equal(skull[0].numpy() > 0, hung(bone, grid, pool, int(24 * pool / cell)))


def hung(bone: np.ndarray, grid: int, pool: int, headroom: int) -> np.ndarray:
    """Center the bone across, hang it below the top, and mark the cells that hold any."""
    low, high = (f(np.argwhere(bone), axis=0) for f in (np.min, np.max))
    bone = bone[low[0] : high[0] + 1, low[1] : high[1] + 1, low[2] : high[2] + 1]
    edge = grid * pool
    cube = np.zeros((edge,) * 3, dtype=bool)
    start = [(edge - n) // 2 for n in bone.shape[:2]]
    assert min(start) >= 0
    bone = bone[:, :, -(edge - headroom) :]
    box = tuple(slice(s, s + n) for s, n in zip(start, bone.shape[:2], strict=True))
    cube[(*box, slice(edge - headroom - bone.shape[2], edge - headroom))] = bone
    return cube.reshape(grid, pool, grid, pool, grid, pool).any(axis=(1, 3, 5))


def test_a_binary_mask_gives_the_grid_of_its_ct(heads: Path, tmp_path: Path) -> None:
    """``--bone_threshold 0.5`` takes masks; what is not the skull's piece is left out of both."""
    values, affine = read_nifti(heads / "head0.nii.gz")
    mask = values >= 300
    mask[:2, :2, :2] = True
    save_nifti(tmp_path / "mask.nii.gz", mask.astype(np.uint8), affine)
    grids = []
    for path, threshold in ((heads / "head0.nii.gz", 300), (tmp_path / "mask.nii.gz", 0.5)):
        parser = config(TRAIN, bone_threshold=threshold, **SMALL)
        data: Any = {"skull": str(path)}
        for step in parser.get_parsed_content("train#deterministic_transforms"):
            data = step(data)
        grids.append(data["skull"].numpy() > 0)
    overlap = 2 * (grids[0] & grids[1]).sum() / (grids[0].sum() + grids[1].sum())
    assert overlap > 0.8


# Training and scoring


@pytest.fixture(scope="module")
def trained(skull_bundle: Path, heads: Path) -> Path:
    """The bundle after a short training from the command line."""
    options = {**SMALL, **TINY, "max_epochs": 2, "val_count": 1, "dataset_dir": heads}
    run = command(skull_bundle, "run", "--config_file", "configs/train.json", *flags(options))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert len(re.findall("train_loss: [0-9.]+", run.stdout)) == 2
    assert "implant_dice" in run.stdout
    return skull_bundle


def test_training_writes_the_best_and_the_last_state(trained: Path) -> None:
    best, last = (torch.load(trained / "models" / f"{n}.pt", weights_only=True) for n in ("model", "last"))
    assert set(last) == {"model", "optimizer", "scaler", "trainer", "validator", "best"}
    assert last["optimizer"]["param_groups"][0]["amsgrad"] is True
    assert {k: v.shape for k, v in best.items()} == {k: v.shape for k, v in last["model"].items()}


@pytest.mark.slow
def test_training_goes_on_from_the_last_state(trained: Path, heads: Path, tmp_path: Path) -> None:
    """With one volume per batch, so that the coarsest level holds a single voxel."""
    before = torch.load(trained / "models" / "last.pt", weights_only=True)
    newest = max((trained / "models").glob("last_checkpoint*.pt"), key=lambda file: file.stat().st_mtime_ns)
    assert torch.load(newest, weights_only=True)["optimizer"]["state"][0]["step"] == 2
    (tmp_path / "last_checkpoint_epoch=2.pt").write_bytes(newest.read_bytes())  # all that a killed training leaves
    options = {**SMALL, **TINY, "max_epochs": 3, "batch_size": 1, "resume": True}
    run_here([TRAIN], dataset_dir=str(heads), ckpt_dir=str(tmp_path), **options)
    after = torch.load(tmp_path / "last.pt", weights_only=True)
    steps = [state["optimizer"]["state"][0]["step"] for state in (before, after)]
    assert (float(steps[0]), float(steps[1])) == (2, 3)


def test_validation_cuts_the_same_defects_every_time(heads: Path) -> None:
    samples = []
    for _ in range(2):
        parser = config(TRAIN, dataset_dir=str(heads), **SMALL, **TINY)
        samples.append(parser.get_parsed_content("validate#dataset"))
    assert len(samples[0]) == 2
    for first, again in zip(*samples, strict=True):
        assert set(first) == {"image", "label"}
        assert first["image"].dtype == first["label"].dtype == torch.uint8, "134 million voxels at 512^3"
        assert torch.equal(first["image"], again["image"])
        assert torch.equal(first["label"], again["label"])
        implant, skull = first["label"]
        assert torch.equal(skull, first["image"][0])
        assert not ((implant > 0) & (skull > 0)).any()
    assert not torch.equal(samples[0][0]["image"], samples[0][1]["image"])


@pytest.mark.slow
def test_evaluation_writes_scores_of_every_defect(trained: Path, heads: Path, tmp_path: Path) -> None:
    files = [trained / "configs" / "train.json", trained / "configs" / "evaluate.json"]
    folders = {"bundle_root": str(trained), "dataset_dir": str(heads), "output_dir": str(tmp_path)}
    run_here(files, **SMALL, **TINY, val_count=2, **folders)
    table = (tmp_path / "metrics.csv").read_text()
    for name in ("implant_dice", "border_dice", "hd95_mm"):
        assert name in table
        rows = (tmp_path / f"{name}_raw.csv").read_text().splitlines()
        assert len(rows) == 1 + 4
        assert all("head" in row for row in rows[1:])


@pytest.mark.parametrize(("file", "kind"), [(TRAIN, "train"), (INFERENCE, "infer")], ids=["train", "inference"])
def test_monai_finds_the_properties_it_asks_for(file: Path, kind: str, heads: Path) -> None:
    work = ConfigWorkflow(
        config_file=str(file),
        meta_file=str(SKULL / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        dataset_dir=str(heads),
        **SMALL,
        initialize=[],
    )
    work.initialize()
    assert work.check_properties() == []


# Inference


def test_inference_writes_both_masks_in_the_images_geometry(
    trained: Path, defective: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    options = {**SMALL, "network_def#channels": TINY["network_def#channels"]}
    folders = {"dataset_dir": defective[0], "output_dir": tmp_path}
    run = command(trained, "run", "--config_file", "configs/inference.json", *flags({**options, **folders}))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    check_written(tmp_path, defective[0])


def check_written(output: Path, folder: Path) -> np.ndarray:
    """Implant and completed skull lie on the image's grid and fit together; gives the implant."""
    image, affine = read_nifti(folder / "patient.nii.gz")
    masks = {}
    for name in ("implant", "completed"):
        values, written = read_nifti(output / "patient" / f"patient_{name}.nii.gz")
        assert values.dtype == np.uint8
        assert values.shape == image.shape
        assert set(np.unique(values)) <= {0, 1}
        np.testing.assert_allclose(written, affine, atol=1e-4)
        masks[name] = values > 0
    pieces, _ = ndimage.label(image >= 300, np.ones((3, 3, 3)))
    bone = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    assert not (masks["implant"] & bone).any()
    assert np.array_equal(masks["completed"], masks["implant"] | bone)
    return masks["implant"]


class Knowing:
    """An inferer that knows the missing bone: logits on the grid by asking where each cell lies in the image."""

    def __init__(self, missing: np.ndarray, affine: np.ndarray) -> None:
        self.missing, self.affine = missing, affine

    def __call__(self, inputs: Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Positive where the grid's bone is, and where any of 3^3 points in a cell lies in missing bone."""
        step = np.linalg.inv(self.affine) @ np.asarray(inputs.affine.reshape(-1, 4, 4)[0])
        logits = torch.where(inputs > 0, 5.0, -5.0)
        for offset in product((-1 / 3, 0, 1 / 3), repeat=3):
            moved = step @ np.array([*offset, 1.0])
            found = ndimage.affine_transform(
                self.missing.astype(np.uint8), step[:3, :3], moved[:3], tuple(inputs.shape[2:]), order=0
            )
            logits[0, 0][torch.from_numpy(found > 0).to(inputs.device)] = 5.0
        return MetaTensor(logits).copy_meta_from(inputs)


@pytest.mark.slow
def test_a_perfect_network_gives_the_missing_piece(defective: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """All that is not the network, there and back, on a tilted grid of other axes and spacing."""
    folder, missing = defective
    _, affine = read_nifti(folder / "patient.nii.gz")
    implants = []
    for opening in (False, True):
        options = {**SMALL, "cell_mm": 3.0, "opening": opening, "inferer": Knowing(missing, affine)}
        folders = {"dataset_dir": str(folder), "output_dir": str(tmp_path / str(opening))}
        run_here([INFERENCE], "infer", initialize=[], **options, **folders)
        implants.append(check_written(tmp_path / str(opening), folder))
    implant, opened = implants
    dice = 2 * (implant & missing).sum() / (implant.sum() + missing.sum())
    assert dice > 0.75
    assert 0 < opened.sum() < implant.sum()
    assert not (opened & ~implant).any()

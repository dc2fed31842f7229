"""Workplaces for bundle tests: generated CTs as NIfTI files, and runs of MONAI's bundle command inside and outside."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from monai_memeff.apps.skull.phantom import HEAD_LABELS, Phantom, head_phantom
from tests.body_phantom import BODY_LABELS, body_phantom
from tests.fake_cuda import fake_cuda_device
from tests.processes import run_module

ROOT = Path(__file__).resolve().parents[2]
STOCK = Path(__file__).parent / "stock_segmentation"
SKULL = ROOT / "bundles" / "skull_completion_sparse"
TILT = 8.0  # degrees about the left-right axis

Bundle = Callable[..., ConfigWorkflow]


@pytest.fixture(autouse=True)
def _restore_torchs_global_state() -> Any:
    """``set_determinism`` of the bundles changes torch for the whole process."""
    from monai.utils import set_determinism

    yield
    set_determinism(None)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m monai.bundle ...`` in a bundle's folder, on one thread, as a user types it."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return run_module("monai.bundle", *map(str, arguments), folder=folder, variables=variables)


def flags(options: dict[str, Any]) -> list[str]:
    """Options as the command line takes them."""
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def run_here(
    files: Sequence[str | Path], kind: str = "train", fake_gpu: bool = True, **override: Any
) -> ConfigWorkflow:
    """The same as ``monai.bundle run`` in this process, on a fake CUDA device or on the CPU."""
    with fake_cuda_device() if fake_gpu else nullcontext():
        work = ConfigWorkflow(
            config_file=[str(f) for f in files],
            meta_file=str(Path(files[0]).parent / "metadata.json"),
            logging_file=False,
            workflow_type=kind,
            device=torch.device("cuda:0" if fake_gpu else "cpu"),
            **override,
        )
        work.initialize()
        work.run()
        work.finalize()
    return work


def save_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume as NIfTI."""
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values as stored, and the affine."""
    import nibabel as nib

    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def as_scanned(phantom: Phantom, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The volume with axes that run left, back and up, tilted: nothing a bundle may take for granted."""
    from monai.transforms.utils import create_rotate

    flipped = values[::-1, ::-1]
    move = np.eye(4)
    move[:2, :2], move[:2, 3] = -np.eye(2), np.asarray(values.shape[:2]) - 1
    tilt = create_rotate(3, (np.deg2rad(TILT), 0.0, 0.0))
    return np.ascontiguousarray(flipped), np.asarray(tilt) @ phantom.affine.numpy() @ move


@pytest.fixture(scope="session")
def organ_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trunks with a labeled liver to train and validate on, and one to segment."""
    folder = tmp_path_factory.mktemp("organ")
    for number in range(4):
        phantom = body_phantom(shape=(52, 44, 48), spacing=(7.0, 7.0, 9.0), seed=number)
        image, affine = as_scanned(phantom, phantom.image.numpy().astype(np.int16))
        if number == 3:
            save_nifti(folder / "imagesTs" / "new.nii.gz", image, affine)
            continue
        label, _ = as_scanned(phantom, (phantom.labels == BODY_LABELS["liver"]).numpy().astype(np.uint8))
        save_nifti(folder / "imagesTr" / f"case{number}.nii.gz", image, affine)
        save_nifti(folder / "labelsTr" / f"case{number}.nii.gz", label, affine)
    return folder


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generated head CTs with complete skulls."""
    folder = tmp_path_factory.mktemp("heads")
    for number in range(2):
        phantom = head_phantom(shape=(62, 75, 80), spacing=3.0, seed=number)
        save_nifti(folder / f"head{number}.nii.gz", *as_scanned(phantom, phantom.image.numpy().astype(np.int16)))
    return folder


@pytest.fixture(scope="session")
def defective(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder with one head CT that lacks a piece of its vault, and the missing bone (H, W, D) boolean."""
    folder = tmp_path_factory.mktemp("defective")
    phantom = head_phantom(shape=(72, 84, 64), spacing=(2.6, 2.7, 3.7), seed=2)
    image = phantom.image.numpy().astype(np.int16)
    skull = (phantom.labels == HEAD_LABELS["skull"]).numpy()
    places = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), -1) @ phantom.affine.numpy()[:3, :3].T
    places += phantom.affine.numpy()[:3, 3]
    side = places[skull & (places[..., 0] > 0)]
    top = places[skull][:, 2].max()
    side = side[side[:, 2] > top - 45]
    center = side[side[:, 0].argmax()]
    missing = (((places - center) ** 2).sum(-1) < 30**2) & (image > 150)
    implant = missing & (image > 300)
    image[missing] = 40
    cut, affine = as_scanned(phantom, image)
    save_nifti(folder / "patient.nii.gz", cut, affine)
    return folder, as_scanned(phantom, implant)[0]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, organ_data: Path) -> Path:
    """A copy of the stock bundle, as downloaded."""
    return Path(shutil.copytree(STOCK, tmp_path_factory.mktemp("zoo") / "stock_segmentation"))


@pytest.fixture(scope="module")
def skull_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the skull completion bundle without trained weights."""
    target = tmp_path_factory.mktemp("bundles") / SKULL.name
    return Path(shutil.copytree(SKULL, target, ignore=shutil.ignore_patterns("models", "eval")))

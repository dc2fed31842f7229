"""SIGKILL at random moments of `memeff run` and of a training: run again, it ends as if nobody had killed it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from monai_memeff.hosts.run import run_studies
from tests.bundles.conftest import ROOT, run_here, save_nifti
from tests.hosts.bundles import image, small_bundle
from tests.processes import LIBRARIES

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
STUDIES = "abc"
EPOCHS = 4
TRAININGS: dict[str, dict[str, Any]] = {
    "cranial_cavity_clstm": {
        "network_def#channels": [2, 3],
        "pretrained": "",
        "learning_rate": 0.01,
        "iterations": 2 * EPOCHS,
        "frozen_iterations": 3,
        "val_interval": 2,
    },
    "liver_tumor_halo": {"side": 8, "features": [2, 4], "convs": 1, "max_epochs": EPOCHS, "val_count": 1},
    "organ_occupancy": {
        "network_def#channels": [2, 4],
        "organs": ["liver"],
        "points": 64,
        "milestones": [2, 3],
        "max_epochs": EPOCHS,
        "val_interval": 1,
    },
}
"""Small ones, as random as they are: order, augmentation, points; the learning rate changes on the way."""


def begin(action: Callable[..., object], *arguments: object) -> BaseProcess:
    """Work in a process of its own, forked from a server: a fork of this one, which has computed, may crash."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=action, args=arguments)
    process.start()
    return process


def timed(action: Callable[..., object], *arguments: object) -> float:
    """Seconds of work that nobody interrupts."""
    began = time.perf_counter()
    process = begin(action, *arguments)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - began


def killed_with(found: Callable[[], object], action: Callable[..., object], *arguments: object) -> None:
    """Kill work as soon as something of it is there."""
    process = begin(action, *arguments)
    while process.is_alive() and not found():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert found()


def killed(seconds: float, action: Callable[..., object], *arguments: object) -> None:
    """Kill work after so many seconds; it may have ended before, but not by itself in any other way."""
    process = begin(action, *arguments)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)


@pytest.mark.long
def test_studies_are_whole_or_absent_and_the_rest_is_done_later(tmp_path: Path) -> None:
    bundle, inputs = small_bundle(tmp_path / "bundle", inferer__roi_size=[16, 16, 16]), tmp_path / "in"
    inputs.mkdir()
    for number, name in enumerate(STUDIES):
        nibabel.save(nibabel.Nifti1Image(image((16, 16, 9), number), np.eye(4)), inputs / f"{name}.nii")
    whole, output, draw = tmp_path / "whole", tmp_path / "out", random.Random(0)
    took = timed(run_studies, bundle, [inputs], whole)
    for _ in range(4):
        killed(draw.uniform(0, took), run_studies, bundle, [inputs], output)
        for folder in output.glob("[a-c]"):
            assert {file.name for file in folder.iterdir()} == {"report.json", "segmentation.nii.gz"}
    assert run_studies(bundle, [inputs], output) == 0
    for name in STUDIES:
        file = Path(name, "segmentation.nii.gz")
        assert (output / file).read_bytes() == (whole / file).read_bytes()
    assert sorted(entry.name for entry in output.iterdir()) == list(STUDIES)


def last(folder: Path) -> Path:
    """The newest checkpoint."""
    return max(folder.glob("last_checkpoint*.pt"), key=lambda file: file.stat().st_mtime_ns)


def epochs_of(folder: Path) -> int:
    """How many epochs the newest checkpoint has seen."""
    done = [int(file.stem.rpartition("=")[2]) for file in folder.glob("last_checkpoint*.pt")]
    return max(done, default=0)


def train(bundle: str, data: Path, folder: Path) -> None:
    """Train, or go on with the training that is there."""
    found = any(folder.glob("last_checkpoint*.pt"))
    options = {"dataset_dir": str(data), "ckpt_dir": str(folder), "resume": found, **TRAININGS[bundle]}
    run_here([ROOT / "bundles" / bundle / "configs" / "train.json"], fake_gpu=False, **options)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes with labels, one of them for validation."""
    folder = tmp_path_factory.mktemp("heads")
    values = image((10, 12, 9))
    for number in range(3):
        save_nifti(folder / "imagesTr" / f"{number}.nii.gz", np.roll(values, number), np.eye(4))
        save_nifti(folder / "labelsTr" / f"{number}.nii.gz", (values > 60).astype(np.uint8), np.eye(4))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("bundle", TRAININGS)
def test_a_bundles_training_goes_on_as_if_nobody_had_killed_it(bundle: str, heads: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    took, epochs = timed(train, bundle, heads, whole), 0
    for kill in (
        partial(killed_with, partial(epochs_of, out)),
        partial(killed, random.Random(1).uniform(0.3, 1) * took),
    ):
        kill(train, bundle, heads, out)
        for file in out.glob("*.pt"):
            torch.load(file, weights_only=True)
        assert epochs_of(out) >= epochs  # nothing that was saved is lost
        epochs = epochs_of(out)
    timed(train, bundle, heads, out)
    assert last(out).name == last(whole).name == f"last_checkpoint_epoch={EPOCHS}.pt"
    for find in (last, lambda folder: folder / "model.pt"):
        ours, theirs = (torch.load(find(folder), weights_only=True) for folder in (out, whole))
        for name in ("model", "optimizer", "scheduler"):
            if name in theirs:
                torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
        if "model" not in theirs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

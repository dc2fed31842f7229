"""SIGKILL at random moments of `memeff run` and of a training: run again, it ends as if nobody had killed it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
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
CAVITY = ROOT / "bundles" / "cranial_cavity_clstm" / "configs"
STILL: dict[str, Any] = {"network_def#channels": [2, 3], "rotation_degrees": 0, "shift": 0, "pretrained": ""}
"""A small network, and nothing random: a training that goes on is the one that was not interrupted."""
EPOCHS = 4


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


def train(data: Path, folder: Path) -> None:
    """Train, or go on with the training that is there."""
    found = any(folder.glob("last_checkpoint*.pt"))
    options = {"dataset_dir": str(data), "ckpt_dir": str(folder), "resume": found, "learning_rate": 0.01}
    long = {"iterations": EPOCHS, "frozen_iterations": 1, "val_interval": 1}
    run_here([CAVITY / "train.json"], fake_gpu=False, **STILL, **long, **options)


@pytest.mark.slow
def test_a_bundles_training_goes_on_as_if_nobody_had_killed_it(tmp_path: Path) -> None:
    values = image((10, 12, 9))
    for number in range(2):
        save_nifti(tmp_path / "imagesTr" / f"{number}.nii.gz", np.roll(values, number), np.eye(4))
        save_nifti(tmp_path / "labelsTr" / f"{number}.nii.gz", (values > 60).astype(np.uint8), np.eye(4))
    took, draw, epochs = timed(train, tmp_path, tmp_path / "whole"), random.Random(1), 0
    for _ in range(3):
        killed(draw.uniform(0.3, 1) * took, train, tmp_path, tmp_path / "out")
        for file in (tmp_path / "out").glob("*.pt"):
            torch.load(file, weights_only=True)
        done = [int(file.stem.rpartition("=")[2]) for file in (tmp_path / "out").glob("last_checkpoint*.pt")]
        assert max(done, default=0) >= epochs  # nothing that was saved is lost
        epochs = max(done, default=0)
    timed(train, tmp_path, tmp_path / "out")
    assert last(tmp_path / "out").name == last(tmp_path / "whole").name == f"last_checkpoint_epoch={EPOCHS}.pt"
    for find in (last, lambda folder: folder / "model.pt"):
        ours, theirs = (torch.load(find(tmp_path / name), weights_only=True) for name in ("out", "whole"))
        torch.testing.assert_close(ours.get("model", ours), theirs.get("model", theirs), rtol=0, atol=0)

"""The main job from end to end on a generated head, with training cut to seconds."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from monai_memeff.apps.skull.demo import methods
from monai_memeff.apps.skull.demo.options import SkullOptions
from monai_memeff.apps.skull.demo.run import run_demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    run_demo(SkullOptions(output, size=64, seconds=2.0, threshold=300.0, defects=2))
    return output


@pytest.mark.exhaustive
def test_everything_is_written_and_nothing_else(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"report.txt", "report.json", "figure.png", "implant.nii.gz", "removed_bone.nii.gz"} <= names
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.exhaustive
def test_report_compares_all_methods(folder):
    report = json.loads((folder / "report.json").read_text())
    names = ["registered mirror", "shipped model", "sparse network", "dense MONAI UNet"]
    assert [m["name"] for m in report["methods"]] == names
    assert report["methods"][1]["train_seconds"] is None
    sparse = report["methods"][2]
    assert len(sparse["scores"]) == 2
    assert sparse["parameters"] == 434_695
    assert sparse["train_peak_bytes"] > sparse["test_peak_bytes"] > 0
    assert 0.05 < report["occupancy"] < 0.3
    text = (folder / "report.txt").read_text()
    assert "one and the same head" in text
    assert "registered mirror" in text


@pytest.mark.exhaustive
def test_files_lie_in_the_image_s_geometry(folder):
    removed = nibabel.load(folder / "removed_bone.nii.gz")
    left = nibabel.load(folder / "defective_skull.nii.gz")
    implant = nibabel.load(folder / "implant.nii.gz")
    assert removed.shape == left.shape == implant.shape
    np.testing.assert_allclose(removed.affine, implant.affine)
    assert np.asarray(removed.dataobj).any()
    assert not (np.asarray(removed.dataobj).astype(bool) & np.asarray(left.dataobj).astype(bool)).any()


@pytest.mark.slow
def test_training_learns(threads, monkeypatch):
    """A short run on a small shell lowers the loss; its clock ticks when it is read, so that iterations are counted."""
    torch.manual_seed(0)
    monkeypatch.setattr(methods, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    axes = torch.meshgrid(*(torch.linspace(-1, 1, 64),) * 3, indexing="ij")
    radius = sum(a**2 * s for a, s in zip(axes, (1.4, 1.8, 1.6), strict=True)).sqrt()
    skull = ((radius > 0.9) & (radius < 1.0)).float()[None]
    method = methods.SparseMethod()
    losses: list[float] = []
    done = methods.train(method, methods.DefectSampler(skull, 0, 1), 48.0, 4e-3, lambda f, i, loss: losses.append(loss))
    assert done.iterations == len(losses) > 3
    assert losses[-1] < 0.8 * losses[0]
    found = methods.implant(method, methods.DefectSampler(skull, 1, 1)()[0][0])
    assert found.shape == (64, 64, 64)
    assert found.dtype == bool


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", [(), ("--systems",)], ids=["skull", "systems"])
def test_an_interrupt_at_any_moment_leaves_nothing(words: tuple[str, ...], tmp_path: Path) -> None:
    """Ctrl-C while it starts, reads, trains: status 130, or by the signal before Python has its handler; no folder."""
    for delay in np.random.default_rng(0).uniform(2, 30, 2):
        command = [
            sys.executable,
            "-m",
            "monai_memeff",
            "demo",
            *words,
            "--seconds",
            "60",
            "--output",
            tmp_path / "out",
        ]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=120)
        assert running.returncode in (130, -signal.SIGINT), said
        assert "Traceback" not in said or running.returncode == -signal.SIGINT
        assert not list(tmp_path.iterdir())

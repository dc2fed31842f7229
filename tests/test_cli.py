"""The command line: help, the overlay and merge commands, and one line with exit status 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from monai_memeff import cli
from monai_memeff.overlays import overlay_names


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run `memeff` in this process as `main` does; exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["memeff", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def save(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine), path)
    return path


def head(shape: tuple[int, ...] = (70, 72, 74)) -> np.ndarray:
    """A bony shell in HU."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    return np.where(np.abs(radius - 0.85) < 0.08, 1000, -1000).astype(np.int16)


BAD = {
    "no bone": lambda: np.full((70, 70, 70), -1000, np.int16),
    "all bone": lambda: np.full((70, 70, 70), 2000, np.int16),
    "NaN": lambda: np.where(head() > 0, np.nan, head()).astype(np.float32),
    "2D": lambda: head()[:, :, 30],
    "4D": lambda: np.stack([head()] * 3, axis=-1),
    "tiny": lambda: head((9, 9, 9)),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_bad_images_end_in_one_line(kind, tmp_path, monkeypatch, capsys):
    image = save(tmp_path / "bad.nii.gz", BAD[kind]())
    status, _, err = run(monkeypatch, capsys, "demo", "--image", image, "--output", tmp_path / "out")
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("memeff: ")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bad.nii.gz"]


def test_missing_truncated_and_foreign_files(tmp_path, monkeypatch, capsys):
    whole = save(tmp_path / "whole.nii.gz", head())
    (tmp_path / "half.nii.gz").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "words.nii.gz").write_text("not an image")
    for name in ("absent.nii.gz", "half.nii.gz", "words.nii.gz"):
        status, _, err = run(monkeypatch, capsys, "demo", "--image", tmp_path / name, "--output", tmp_path / "out")
        assert (status, len(err.strip().splitlines())) == (2, 1), name
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [("--size", 32), ("--size", 100000), ("--seconds", -1), ("--defects", 0)], ids=["small", "big", "s", "d"]
)
def test_bad_options_end_in_one_line(words, tmp_path, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "demo", "--output", tmp_path / "out", *words)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("mine")
    status, _, err = run(monkeypatch, capsys, "demo", "--output", tmp_path / "out")
    assert status == 2
    assert "out" in err
    assert (tmp_path / "out").read_text() == "mine"


def test_overlay_lists_and_finds():
    runner = CliRunner()
    assert runner.invoke(cli.app, ["overlay"]).output.split() == list(overlay_names())
    path = runner.invoke(cli.app, ["overlay", "sparse_unet"]).output.strip()
    assert "SparseUNet" in Path(path).read_text()


def test_merge_writes_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.json").write_text(json.dumps({"network_def": {"_target_": "UNet", "in_channels": 1}}))
    (tmp_path / "over.json").write_text(json.dumps({"network_def#_target_": "monai_memeff.sparse.SparseUNet"}))
    words = ("merge", tmp_path / "train.json", tmp_path / "over.json", "--output", tmp_path / "sub" / "all.json")
    assert run(monkeypatch, capsys, *words)[0] == 0
    merged = json.loads((tmp_path / "sub" / "all.json").read_text())
    assert merged["network_def"] == {"_target_": "monai_memeff.sparse.SparseUNet", "in_channels": 1}
    status, _, err = run(monkeypatch, capsys, "merge", tmp_path / "none.json", "--output", tmp_path / "x.json")
    assert status == 2
    assert "none.json" in err


def test_doctor_names_the_engines():
    output = CliRunner().invoke(cli.app, ["doctor"]).output
    assert "on cpu tensors:" in output
    assert "native: usable" in output
    assert "sparse engine spconv: spconv is for CUDA tensors only" in output
    assert "in use: native" in output
    assert "torch" in output


def test_module_and_command_are_one():
    done = subprocess.run([sys.executable, "-m", "monai_memeff", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout

"""The command line: what starts without torch, the small commands, and one line with a status for bad input."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import monai_memeff
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
    "words",
    [("--size", 32), ("--size", 100000), ("--size", "x"), ("--seconds", -1), ("--defects", 0), ("--seed", -1)],
    ids=["small", "big", "word", "seconds", "defects", "seed"],
)
def test_bad_options_end_in_one_line(words, tmp_path, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "demo", "--output", tmp_path / "out", *words)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--systems", "--defective"), "no use for --defective"),
        (("--systems", "--size", 64, "--defects", 3), "no use for --size and --defects"),
        (("--label", "absent.nii"), "no use for --label"),
        (("--defective", "--label", "absent.nii"), "no use for --label"),
        (("--defective",), "give its CT with --image"),
        (("--defective", "--image", "absent.nii.gz"), "absent.nii.gz"),
        (("--systems", "--label", "absent.nii.gz"), "has its own labels"),
        (("--systems", "--image", "absent.nii.gz"), "absent.nii.gz"),
        (("--systems", "--seconds", "nan"), "positive and finite"),
    ],
)
def test_options_that_do_not_go_together_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "demo", "--output", tmp_path / "out", *words)
    assert (status, len(err.strip().splitlines())) == (2, 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["NaN", "2D", "4D", "tiny", "flat"])
def test_bad_scans_end_in_one_line(kind, tmp_path, monkeypatch, capsys):
    image = save(tmp_path / "bad.nii.gz", BAD.get(kind, lambda: np.full((30, 30, 30), 7, np.int16))())
    status, _, err = run(monkeypatch, capsys, "demo", "--systems", "--image", image, "--output", tmp_path / "out")
    assert (status, len(err.strip().splitlines())) == (2, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.nii.gz"]


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


def test_what_is_not_there_ends_in_one_line(monkeypatch, capsys):
    for words in (("overlay", "nonsense"), ("nonsense",), ("bundle", "copy", "nonsense", "x"), ("bundle", "copy")):
        status, out, err = run(monkeypatch, capsys, *words)
        assert (status, out, len(err.strip().splitlines())) == (2, "", 1), words
        assert err.startswith("memeff: ")
    status, _, err = run(monkeypatch, capsys, "demo", "--size", "63")
    assert (status, len(err.strip().splitlines())) == (2, 1)
    assert "got 63" in err


def test_help_is_shown_without_a_command(monkeypatch, capsys):
    assert "bundle" in run(monkeypatch, capsys)[1]
    assert "copy" in run(monkeypatch, capsys, "bundle")[1]
    assert run(monkeypatch, capsys, "--version")[:2] == (0, f"{monai_memeff.__version__}\n")


LIGHT = (
    ("--help",),
    ("--version",),
    ("overlay",),
    ("overlay", "halo"),
    ("bundle",),
    ("bundle", "list"),
    ("run", "--help"),
    ("estimate", "--help"),
)


def test_what_needs_no_torch_starts_without_it(tmp_path):
    """By the console script's entry, all in one process: neither torch nor MONAI nor numpy is loaded."""
    words = [*map(list, LIGHT), ["bundle", "copy", "skull_completion_sparse", str(tmp_path / "here")]]
    probe = f"""
import sys
sys.path.insert(0, {str(Path(monai_memeff.__file__).parent / "_entry")!r})
from _monai_memeff_command import main
for words in {words!r}:
    sys.argv = ["memeff", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end
print(sorted({{"torch", "monai", "numpy", "scipy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "here" / "configs" / "train.json").is_file()


def test_as_a_module_it_starts_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "monai_memeff", "overlay", "halo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "monai_memeff.overlays" in loaded
    assert not {"torch", "monai", "numpy"} & loaded


def test_the_command_loads_a_subpackage_when_it_is_used():
    assert monai_memeff.__getattr__("sparse") is monai_memeff.sparse
    with pytest.raises(AttributeError, match="its subpackages are apps, clstm"):
        monai_memeff.__getattr__("nonsense")


def checkpoints(folder: Path) -> dict[str, Path]:
    """Files that are not checkpoints of the completion network."""
    whole = folder / "whole.pt"
    torch.save({"weight": torch.zeros(100, 100)}, whole)
    torch.save({"network": torch.nn.Conv3d(1, 1, 3)}, folder / "object.pt")
    torch.save([torch.zeros(3)], folder / "list.pt")
    torch.save({0: torch.zeros(3)}, folder / "numbered.pt")
    torch.save({f"layer{number}.kernel": torch.tensor(1.0) for number in range(13)}, folder / "scalars.pt")
    content = {"text": b"not a checkpoint\n", "empty": b"", "truncated": whole.read_bytes()[:20_000]}
    content |= {"damaged": whole.read_bytes()[:200] + bytes(300) + whole.read_bytes()[500:], "pickle": b"\x80\x02X"}
    for name, data in content.items():
        (folder / f"{name}.pt").write_bytes(data)
    return {path.stem: path for path in folder.glob("*.pt")} | {"absent": folder / "none.pt", "folder": folder}


def test_what_is_no_checkpoint_is_not_converted(tmp_path, monkeypatch, capsys):
    said = {}
    for name, path in checkpoints(tmp_path).items():
        status, out, err = run(monkeypatch, capsys, "convert", path, tmp_path / "out" / "state.pt")
        assert (status, out, len(err.strip().splitlines())) == (2, "", 1), (name, err)
        assert str(path) in err
        said[name] = err
    assert "is empty" in said["empty"]
    assert "is cut off" in said["truncated"]
    assert "is not a checkpoint" in said["text"]
    assert "other objects than tensors" in said["object"]
    assert "13 convolutions" in said["whole"]
    for numbers in ("a,b", "1,2", ",", "0,0,0,0,0,0,0"):
        status, _, err = run(
            monkeypatch, capsys, "convert", tmp_path / "whole.pt", tmp_path / "out", "--channels", numbers
        )
        assert (status, len(err.strip().splitlines())) == (2, 1), numbers
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_written_end_in_one_line(tmp_path, monkeypatch, capsys):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(shutil, "copyfile", full)
    status, _, err = run(monkeypatch, capsys, "bundle", "copy", "organ_occupancy", tmp_path / "new" / "here")
    assert (status, err) == (2, f"memeff: {tmp_path / 'x'}: No space left on device\n")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_one_line_and_status_130(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    status, out, err = run(monkeypatch, capsys, "bundle", "copy", "organ_occupancy", tmp_path / "here")
    assert (status, out, err) == (130, "", "memeff: interrupted\n")
    assert not list(tmp_path.iterdir())


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


@pytest.mark.slow
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

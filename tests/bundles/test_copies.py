"""Bundles that ship with the package: listed, found, and copied whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from monai_memeff import bundles
from monai_memeff.errors import InputError
from tests.bundles.conftest import ROOT


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder as a wheel has it, with weights, read-only files and the remains of a run."""
    folder = tmp_path / "site-packages" / "bundles"
    shutil.copytree(ROOT / "bundles" / "organ_occupancy", folder / "organ", ignore=shutil.ignore_patterns("models"))
    (folder / "organ" / "models").mkdir()
    (folder / "organ" / "models" / "model.pt").write_bytes(bytes(range(256)))
    (folder / "organ" / "configs" / "train.json").chmod(0o444)
    (folder / "organ" / "__pycache__").mkdir()
    (folder / "organ" / "__pycache__" / "x.pyc").write_bytes(b"x")
    (folder / "__init__.py").touch()
    monkeypatch.setattr(bundles, "HERE", folder)
    return folder


def test_names_and_tasks() -> None:
    names = bundles.bundle_names()
    assert names == sorted(path.name for path in (ROOT / "bundles").iterdir())
    assert all(0 < len(bundles.bundle_task(name)) < 120 and "\n" not in bundles.bundle_task(name) for name in names)


@pytest.mark.parametrize("name", ["skull", "", ".", "../bundles/organ_occupancy", "organ_occupancy/configs"])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose one of cranial_cavity_clstm, "):
        bundles.copy_bundle(name, tmp_path / "here")
    assert not list(tmp_path.iterdir())


def test_a_copy_brings_every_file_and_can_be_worked_in(shipped: Path, tmp_path: Path) -> None:
    assert bundles.bundle_names() == ["organ"]
    copy = bundles.copy_bundle("organ", tmp_path / "new" / "here")
    files = tree(shipped / "organ")
    del files[os.path.join("__pycache__", "x.pyc")]
    assert tree(copy) == files
    assert (copy / "models" / "model.pt").read_bytes() == bytes(range(256))
    assert (copy / "configs" / "train.json").stat().st_mode & 0o200
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["here"]


def test_an_empty_folder_is_filled_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the shell's working directory."""
    monkeypatch.chdir(tmp_path)
    number = tmp_path.stat().st_ino
    bundles.copy_bundle("organ_occupancy", ".")
    assert tmp_path.stat().st_ino == number
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("models", "eval")) == [
        "LICENSE",
        "configs",
        "docs",
    ]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, reason in (("full", "is not empty"), ("file", "is a file")):
        with pytest.raises(InputError, match=reason):
            bundles.copy_bundle("organ_occupancy", tmp_path / name)
    with pytest.raises(OSError, match="Not a directory"):
        bundles.copy_bundle("organ_occupancy", tmp_path / "file" / "below")
    assert tree(tmp_path) == {"file": b"mine", os.path.join("full", "mine"): b"mine"}


@pytest.mark.parametrize("place", ["new", "empty", "deep/er/new"])
@pytest.mark.parametrize("files", [0, 3])
def test_an_interrupt_leaves_nothing(place: str, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copyfile, copied = shutil.copyfile, []

    def interrupted(source: Path, target: Path) -> None:
        if len(copied) == files:
            raise KeyboardInterrupt
        copied.append(copyfile(source, target))

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyboardInterrupt):
        bundles.copy_bundle("organ_occupancy", tmp_path / place)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["empty"]

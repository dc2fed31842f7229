"""Files are written whole or not at all, and never over their own source."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_memeff import cli
from monai_memeff.apps.skull.demo import report
from monai_memeff.clstm import NiftiSlabs
from monai_memeff.clstm.figure import save_agreement
from monai_memeff.data import LabelFile, atomic_write, save_nifti
from monai_memeff.data.folder import atomic_folder, check_output_folder
from monai_memeff.errors import InputError
from monai_memeff.occupancy.mesh import labels_to_mesh, write_mesh
from monai_memeff.sparse.core import map_cache
from tests.faults.volume_files import AFFINE, names, values


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_a_write_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "file.json"
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as work:
        interrupt(work.write_text("half"))
    assert names(tmp_path / "sub") == []
    for text in ("first", "second"):
        with atomic_write(target) as work:
            assert work.suffix == ".part"
            work.write_text(text)
            assert target.exists() == (text == "second")
        assert target.read_text() == text
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as work:
        interrupt(work.write_text("third"))
    assert target.read_text() == "second"
    assert names(tmp_path / "sub") == ["file.json"]


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_write(tmp_path / "link.txt") as work:
        work.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "fresh.txt") as work:
            work.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "fresh.txt").stat().st_mode & 0o777 == 0o640


def test_a_killed_process_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # nothing of this process may run on in the copy
        labels = LabelFile(tmp_path / "labels.nii", (5, 6, 7), np.eye(4))
        labels[..., :3] = 1
        os.kill(os.getpid(), 9)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".part"
    with pytest.raises(nib.filebasedimages.ImageFileError):
        nib.load(left)


@pytest.mark.parametrize("way", ["same", "link", "hard link", "relative", "folder"])
def test_the_source_is_never_written_over(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "ct.nii"
    nib.save(nib.Nifti1Image(values(), AFFINE), source)
    before = source.read_bytes()
    target: Path = source
    if way == "link":
        target = tmp_path / "link.nii"
        target.symlink_to(source)
    elif way == "hard link":
        target = tmp_path / "hard.nii"
        os.link(source, target)
    elif way == "relative":
        monkeypatch.chdir(tmp_path)
        target = Path("ct.nii")
    elif way == "folder":
        (tmp_path / "inner").mkdir()
        target = tmp_path / "inner" / ".." / "ct.nii"
    with pytest.raises(InputError, match="is the input itself"):
        NiftiSlabs(source).create_labels(target)
    with pytest.raises(InputError, match="is the input itself"), atomic_write(target, source):
        pass
    assert source.read_bytes() == before


def test_commands_do_not_write_over_their_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"x": 1}))
    torch.save({}, tmp_path / "model.pt")
    for words in (("merge", "a.json", "--output", "a.json"), ("convert", "model.pt", "model.pt")):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["memeff", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_demo_writes_neither_over_its_image_nor_into_its_series(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "implant.nii.gz").write_bytes(b"ct")
    with pytest.raises(InputError, match="is the input itself"):
        check_output_folder(tmp_path / "out", report.WRITTEN, tmp_path / "out" / "implant.nii.gz")
    for output in ("series", "series/out", "series/../series"):
        (tmp_path / "series").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="the image's own folder"):
            check_output_folder(tmp_path / output, report.WRITTEN, tmp_path / "series")
    assert check_output_folder(tmp_path / "out", report.WRITTEN, tmp_path / "out" / "ct.nii.gz") == tmp_path / "out"


def test_a_second_run_leaves_no_implant_of_the_first(tmp_path: Path) -> None:
    for written in (("report.json", "implant.stl"), ("report.json", "implant.nii.gz")):
        with atomic_folder(tmp_path / "out", report.WRITTEN, report.REPORTS) as folder:
            for name in written:
                (folder / name).write_text(name)
        (tmp_path / "out" / "mine.txt").write_text("mine")
    assert names(tmp_path / "out") == ["implant.nii.gz", "mine.txt", "report.json"]


def test_writers_that_fail_leave_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = labels_to_mesh(torch.ones(2, 2, 2), np.eye(4))
    picture = np.zeros((4, 4, 4))
    writers = {
        "a.stl": lambda path: write_mesh(path, mesh),
        "a.png": lambda path: save_agreement(path, picture, picture > 0, picture > 0),
        "a.nii": lambda path: save_nifti(path, values(), AFFINE),
        "a.nii.gz": lambda path: save_nifti(path, values(), AFFINE),
    }
    for name, write in writers.items():
        write(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _full)
            with pytest.raises(OSError, match="no space"):
                write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    assert names(tmp_path) == sorted(writers)


def _full(*_: object) -> None:
    raise OSError(28, "no space left on device")


def test_a_cached_kernel_map_with_a_wrong_bit_is_planned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_memeff.sparse.core.neighbors import NeighborTable

    table = NeighborTable(torch.arange(4000).reshape(2, 2000), None, 3, 2000)
    path = tmp_path / "x.pt"
    monkeypatch.setattr(map_cache, "_max_bytes", 2**30)
    map_cache._write(path, table)
    found = map_cache._read(path, torch.device("cpu"))
    assert found is not None
    assert torch.equal(found.entries, table.entries)
    whole = bytearray(path.read_bytes())
    for place in range(60, len(whole), len(whole) // 40):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        found = map_cache._read(path, torch.device("cpu"))
        assert found is None or torch.equal(found.entries, table.entries)
    assert names(tmp_path) == ["x.pt"]

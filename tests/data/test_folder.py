"""Folders of files: all of them or none, and a refusal before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from monai_memeff.data.folder import atomic_folder, check_output_folder
from monai_memeff.errors import InputError

NAMES, LAST = ("picture.png", "report.txt", "report.json"), ("report.txt", "report.json")


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"

    def stop_halfway() -> None:
        with atomic_folder(target, NAMES, LAST) as work:
            (work / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_folder(target, NAMES, LAST) as work:
        (work / "picture.png").write_text("p")
        (work / "report.txt").write_text("r")
        assert not target.exists()
    assert {p.name for p in target.iterdir()} == {"report.txt", "picture.png"}
    (target / "mine").write_text("kept")
    with atomic_folder(target, NAMES, LAST) as work:
        (work / "report.txt").write_text("new")
    assert (target / "report.txt").read_text() == "new"
    assert (target / "mine").read_text() == "kept"
    assert not (target / "picture.png").exists()
    assert list(target.parent.iterdir()) == [target]


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_output_folder(tmp_path / "a" / "b", NAMES) == tmp_path / "a" / "b"
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is a file"):
            check_output_folder(path, NAMES)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="allows no new files"):
        check_output_folder(tmp_path / "a", NAMES)
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(InputError, match="allows no new files"):
        check_output_folder(tmp_path / "a", NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

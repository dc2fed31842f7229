"""What configurations ask of a data folder: an end in one line, and files in pairs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from monai_memeff import bundles


def test_an_empty_folder_ends_the_program() -> None:
    bundles.require_files(["a"], "skull", "/data")
    with pytest.raises(SystemExit) as caught:
        bundles.require_files([], "skull", "/data", "*.nii")
    expected = f"no skull: nothing matches {os.path.join('/data', '*.nii')}; set --dataset_dir and --pattern"
    assert caught.value.code == expected
    with pytest.raises(SystemExit, match=r"^no head: nothing in /data; set --dataset_dir$"):
        bundles.require_files([], "head", "/data")


@pytest.mark.parametrize(("images", "labels"), [([], []), (["a"], []), ([], ["a"]), (["a"], ["a", "b"])])
def test_what_is_no_pair_ends_the_program(images: list[str], labels: list[str]) -> None:
    found = f"found {len(images)} in imagesTr and {len(labels)} in labelsTr of /data; set --dataset_dir"
    with pytest.raises(SystemExit, match=found):
        bundles.require_pairs(images, labels, "/data")
    bundles.require_pairs(["a"], ["b"], "/data")


def test_pairs_by_name(tmp_path: Path) -> None:
    images = ["/one/a.nii", "/one/b.nii"]
    folder = str(tmp_path)
    assert bundles.pair_by_name(images, None, "coarse") == [{"image": images[0]}, {"image": images[1]}]
    first, second = bundles.pair_by_name(images, folder, "coarse")
    assert first == {"image": images[0], "coarse": str(tmp_path / "a.nii")}
    assert second == {"image": images[1], "coarse": str(tmp_path / "b.nii")}
    bundles.require_named(images, None, "coarse mask", "--coarse_dir")
    (tmp_path / "a.nii").touch()
    with pytest.raises(SystemExit) as caught:
        bundles.require_named(images, folder, "coarse mask", "--coarse_dir")
    expected = f"no coarse mask of the name b.nii in {tmp_path}, 1 of 2 images have none; set --coarse_dir"
    assert caught.value.code == expected
    (tmp_path / "b.nii").touch()
    bundles.require_named(images, folder, "coarse mask", "--coarse_dir")


def test_checkpoints(tmp_path: Path) -> None:
    pattern = "last_checkpoint*.pt"
    assert bundles.newest_file(str(tmp_path), pattern) is None
    for number, name in enumerate(("last_checkpoint_9.pt", "last_checkpoint_10.pt", "model.pt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))
    newest = bundles.newest_file(str(tmp_path), pattern)
    assert newest == str(tmp_path / "last_checkpoint_10.pt")
    bundles.require_checkpoint(newest, str(tmp_path), pattern)
    bundles.require_checkpoint(None, str(tmp_path), pattern, resume=False)
    with pytest.raises(SystemExit, match=r"^nothing to resume: no last_checkpoint\*.pt in .*; start without --resume$"):
        bundles.require_checkpoint(None, str(tmp_path), pattern)

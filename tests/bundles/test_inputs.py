"""What configurations ask of a data folder: an end in one line, and files in pairs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from monai_memeff import bundles
from monai_memeff.bundles import bundle_path, checked_option, checked_window


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


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd"])
def test_files_that_sort_otherwise_than_their_labels_end_the_program(ending: str) -> None:
    def files(*names: str) -> list[str]:
        return sorted(f"/data/{name}{ending}" for name in names)

    bundles.require_pairs(files("1_0000", "2_0000"), files("1", "2"), "/data")
    bundles.require_pairs(files("1_0000", "1_0001"), files("1_0000", "1_0001"), "/data")
    bundles.require_pairs(files("image_1", "image_2"), files("label_1", "label_2"), "/data")
    for images, labels in ((("a", "b"), ("b", "c")), (("a", "c"), ("a", "b")), (("1_0000", "10_0000"), ("1", "10"))):
        with pytest.raises(SystemExit, match=f"must sort alike, and .*{ending} of imagesTr comes with .*{ending} of"):
            bundles.require_pairs(files(*images), files(*labels), "/data")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("volume-0 volume-1 volume-10", "segmentation-0 segmentation-1 segmentation-10"),
        ("case2_0000 case3_0000", "case2 case3"),
        ("img_a img_b", "a_seg b_seg"),
        ("2mm_1 2mm_2", "seg1 seg2"),
        ("image", "label"),
    ],
)
def test_names_of_one_case_are_a_pair(images: str, labels: str) -> None:
    bundles.require_pairs([f"/d/{n}.nii" for n in images.split()], [f"/d/{n}.nii.gz" for n in labels.split()], "/d")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("a c", "b c"),
        ("case2_0000 case_0000", "case case2"),  # as they sort
        ("p10 p11", "p20 p21"),
        ("p1_a p1_b", "p2_a p2_b"),
        ("1", "2"),
        ("a1 a2 a4", "a1 a3 a4"),
    ],
)
def test_a_label_of_another_case_ends_the_program(images: str, labels: str) -> None:
    files = [[f"/d/{name}.nii.gz" for name in names.split()] for names in (images, labels)]
    with pytest.raises(
        SystemExit, match=r"must sort alike, and \S+ of imagesTr comes with \S+ of labelsTr in /d: give"
    ):
        bundles.require_pairs(*files, "/d")


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


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf"), "64", None, 64.0])
def test_an_option_out_of_range_ends_in_one_line(value: object) -> None:
    with pytest.raises(SystemExit, match=r"^--grid must be a whole number of at least 1, got "):
        checked_option("grid", value, 1, whole=True)
    assert checked_option("grid", 64, 1, whole=True) == 64


ODD = [float("nan"), -1, "x", [0, 0], None]
PLACES = {
    ("skull_completion_sparse", "inference"): {
        "grid": "fine_grid", "pool": "fine_grid", "cell_mm": "fine_mm", "implant_level": "postprocessing",
        "views": "inferer", "view_level": "inferer",
    },
    ("skull_completion_sparse", "train"): {"grid": "fine_grid", "pool": "fine_grid", "cell_mm": "fine_mm"},
    ("organ_occupancy", "inference"): {"pixdim": "preprocessing", "window": "preprocessing"},
    ("organ_superresolution_sparse", "inference"): {"window": "preprocessing", "coarse_size": "preprocessing"},
    ("liver_tumor_halo", "inference"): {"side": "preprocessing"},
    ("cranial_cavity_clstm", "inference"): {"std": "preprocessing"},
}  # fmt: skip
"""Bundle and configuration -> options, and the place where each is used."""


@pytest.mark.parametrize(("bundle", "options"), PLACES.items(), ids=lambda part: "-".join(part))
def test_options_are_checked_where_they_are_used(bundle: tuple[str, str], options: dict[str, str]) -> None:
    name, file = bundle
    config = ConfigParser.load_config_file(str(bundle_path(name) / "configs" / f"{file}.json"))
    for option, place in options.items():
        for value in ODD:
            parser = ConfigParser(json.loads(json.dumps(config)))
            parser[option] = value
            with pytest.raises(SystemExit, match=f"^--{option} must be"):
                parser.get_parsed_content(place)


def test_a_window_has_a_lower_and_a_higher_end() -> None:
    assert checked_window("window", [-160, 240]) == [-160, 240]
    for value in ([240, -160], [0, 0], [1], None, [float("nan"), 1]):
        with pytest.raises(SystemExit, match=r"^--window must be"):
            checked_window("window", value)

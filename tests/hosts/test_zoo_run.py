"""`memeff run` on bundles of the zoo that read several images, labels or clicks: MONAI's own answers, and halo's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from typing import Any

import nibabel
import numpy as np
import pytest
from monai.bundle import ConfigParser

from monai_memeff.hosts.run import run_studies
from monai_memeff.hosts.run.source.served import serve
from tests.hosts.bundles import series
from tests.hosts.zoo import SHRUNK, prepare, save_weights, scripts_of_the_zoo, workflow

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = {
    "brats_mri_segmentation": {"a_0": "t1c", "a_1": "t1", "a_2": "t2", "a_3": "flair"},
    "renalStructures_CECT_segmentation": {"a/12": "artery", "a/22-": "vein", "a/32-": "excret"},
    "spleen_deepedit_annotation": {"imagesTs/a": "image"},
}
"""Bundle -> files of its first case, and the words by which `memeff run` tells them apart."""


SLOW = [pytest.param(name, marks=pytest.mark.exhaustive) for name in IMAGES if not name.startswith("renal")]


@pytest.fixture(scope="module", params=["renalStructures_CECT_segmentation", *SLOW])
def bundle(request: Any, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle made small, with random weights, whose window is as large as its volumes."""
    folder = tmp_path_factory.mktemp("zoo")
    root = prepare(data_dir / "model_zoo" / request.param, folder)
    with scripts_of_the_zoo():
        file = root / "configs" / "inference.json"
        parser = ConfigParser(json.loads(file.read_text()))
        for place, value in SHRUNK[root.name].items():
            parser[place] = value
        if "roi_size" in parser["inferer"]:
            parser["inferer#roi_size"] = [32, 32, 32]
        file.write_text(json.dumps({key: value for key, value in parser.get().items() if key != "_meta_"}))
        parser["device"] = "cpu"
        save_weights(root, parser.get_parsed_content("network_def"))
        yield root


def case(root: Path, folder: Path) -> Path:
    folder.mkdir()
    for source, word in IMAGES[root.name].items():
        copyfile(root / "data" / f"{source}.nii.gz", folder / f"case_{word}.nii.gz")
    return folder


def labels(folder: Path) -> np.ndarray:
    found: Any = nibabel.load(next(folder.rglob("segmentation.nii.gz")))
    return np.asarray(found.dataobj)


@pytest.mark.slow
def test_labels_are_those_of_monais_command_with_and_without_an_overlay(bundle: Path, tmp_path: Path) -> None:
    images = case(bundle, tmp_path / "case")
    assert run_studies(bundle, [images], tmp_path / "plain") == 0
    assert run_studies(bundle, [images], tmp_path / "halo", ["halo"]) == 0
    plain, halo = labels(tmp_path / "plain"), labels(tmp_path / "halo")
    assert len(np.unique(plain)) > 1
    assert np.mean(plain != halo) < 1e-3  # rounding decides where two classes are as likely
    work = workflow(bundle, "inference")
    work.initialize()
    work.run()
    theirs = [file for file in (bundle / "eval").rglob("*.nii.gz") if "trans" in file.name or "seg" in file.name]
    assert any(np.array_equal(np.asarray(nibabel.load(file).dataobj).squeeze(), plain) for file in theirs)


def test_a_series_is_answered_with_a_seg_where_one_image_is_read(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="DICOM SEG needs the extra [dicom]")
    series(tmp_path / "ct")
    one = len(IMAGES[bundle.name]) == 1
    assert run_studies(bundle, [tmp_path / "ct"], tmp_path / "seg") == 0 if one else 1
    assert (tmp_path / "seg" / "ct" / "segmentation.dcm").is_file() == one


SAVED: dict[str, Any] = {
    "preprocessing": {"transforms": [{"_target_": "LoadImaged", "keys": ["image", "label"]}]},
    "postprocessing": {"transforms": [{"_target_": "SaveImaged", "keys": key} for key in ("pred", "label")]},
}


def test_a_label_that_is_only_copied_is_not_asked_for() -> None:
    served = serve(SAVED)
    assert served["preprocessing"]["transforms"][0]["keys"] == ["image"]
    assert [part["keys"] for part in served["postprocessing"]["transforms"]] == ["pred"]


@pytest.mark.parametrize("place", ["Orientationd", "$x(['label'])", '$lambda d: d["label"]'])
def test_a_label_that_something_names_is_read(place: str) -> None:
    config = json.loads(json.dumps(SAVED))
    config["preprocessing"]["transforms"].append({"_target_": place, "keys": ["label"]} if place[0] != "$" else place)
    assert serve(config)["preprocessing"]["transforms"][0]["keys"] == ["image", "label"]
    assert len(serve(config)["postprocessing"]["transforms"]) == 2

"""The bundle trains and infers at a tiny size on generated bodies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from monai.bundle import ConfigParser, verify_net_in_out

from tests.body_phantom import body_phantom
from tests.bundles.conftest import ROOT, read_nifti, run_here, save_nifti

TINY = {"side": 16, "features": [2, 4, 8], "convs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bodies with a made-up lesion, and one to segment."""
    folder = tmp_path_factory.mktemp("lits")
    for number in range(3):
        phantom = body_phantom(shape=(26, 22, 24), spacing=(14.0, 14.0, 18.0), seed=number)
        image = phantom.image.numpy().astype(np.int16)
        label = (phantom.labels.numpy() > 0).astype(np.uint8)
        label[11:14, 9:12, 10:13] = 2
        affine = phantom.affine.numpy()
        if number == 2:
            save_nifti(folder / "imagesTs" / "new.nii.gz", image, affine)
        else:
            save_nifti(folder / "imagesTr" / f"{number}.nii.gz", image, affine)
            save_nifti(folder / "labelsTr" / f"{number}.nii.gz", label, affine)
    return folder


@pytest.mark.slow
def test_it_trains_infers_and_keeps_the_geometry(data: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(ROOT / "bundles" / "liver_tumor_halo", tmp_path / "liver_tumor_halo"))
    folders = {"bundle_root": str(bundle), "dataset_dir": str(data)}
    run_here([bundle / "configs" / "train.json"], **folders, **TINY, max_epochs=1, val_count=1)
    options = {**TINY, "inferer#partitions": 2}
    # torch.export needs a true GPU for a network that lies on one
    work = run_here([bundle / "configs" / "inference.json"], "infer", False, **folders, **options)
    assert work.inferer.last_report.partitions == 2
    image, affine = read_nifti(data / "imagesTs" / "new.nii.gz")
    result, written = read_nifti(next((bundle / "eval").rglob("*.nii.gz")))
    assert result.shape == image.shape
    np.testing.assert_allclose(written, affine, atol=1e-4)


def test_an_empty_folder_ends_in_one_line(tmp_path: Path) -> None:
    configs = ROOT / "bundles" / "liver_tumor_halo" / "configs"
    with pytest.raises(SystemExit, match=r"in pairs, found 0 in imagesTr and 0 in labelsTr of .*; set --dataset_dir"):
        run_here([configs / "train.json"], dataset_dir=str(tmp_path))
    with pytest.raises(SystemExit, match=r"no image: nothing in .*imagesTs; set --dataset_dir"):
        run_here([configs / "inference.json"], "infer", dataset_dir=str(tmp_path))


def test_the_network_fits_its_description() -> None:
    configs = ROOT / "bundles" / "liver_tumor_halo" / "configs"
    small = {"network_def#features": [2, 4, 8, 16], "network_def#convs": 1}
    verify_net_in_out(
        net_id="network_def", meta_file=str(configs / "metadata.json"), config_file=str(configs / "inference.json"),
        device="cpu", n=2, **small,
    )  # fmt: skip
    config = ConfigParser()
    config.read_config(str(configs / "train.json"))
    assert config["features"] == [128, 256, 512, 1024]

"""MONAI's pipelines, bundles and the command line read DICOM series as our reader does."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage

from monai_memeff import cli
from monai_memeff.apps.skull.demo import report
from monai_memeff.apps.skull.demo.io import read_ct
from monai_memeff.apps.skull.demo.volume import load_head
from monai_memeff.apps.skull.phantom import head_phantom
from monai_memeff.data import VolumeReader, read_volume
from monai_memeff.errors import InputError
from tests.faults.dicom_files import COUNT, numbers, refusal, write_series

pydicom = pytest.importorskip("pydicom", reason="DICOM needs the extra [dicom]")


def test_monais_pipelines_read_through_the_same_door(tmp_path: Path) -> None:
    volume = numbers()
    write_series(tmp_path / "s", volume, keep=[k for k in range(COUNT) if k != 5])
    with pytest.raises(InputError, match="1 slice is missing"):
        LoadImage(reader="monai_memeff.data.VolumeReader")(tmp_path / "s")
    write_series(tmp_path / "s", volume)
    image = LoadImage(reader="monai_memeff.data.VolumeReader", ensure_channel_first=True)(tmp_path / "s")
    np.testing.assert_array_equal(image.numpy()[0], volume)
    torch.testing.assert_close(image.affine, read_volume(tmp_path / "s").image.affine)
    both = LoadImage(reader=VolumeReader(), ensure_channel_first=True)([tmp_path / "s", tmp_path / "s"])
    assert both.shape == (2, 9, 7, COUNT)
    write_series(tmp_path / "t", volume, spacing=(0.8, 0.8, 1.5))
    with pytest.raises(InputError, match="another grid"):
        LoadImage(reader=VolumeReader())([tmp_path / "s", tmp_path / "t"])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated head as a series of 93 slices, as the demo takes it."""
    phantom = head_phantom((72, 88, 93), 2.5, seed=3)
    folder = tmp_path_factory.mktemp("head")
    turned = np.ascontiguousarray(phantom.image.numpy()[::-1, ::-1]).astype(np.int16)  # RAS to LPS
    origin = np.asarray(phantom.affine)[:3, 3] + 2.5 * np.array([71, 87, 0])
    write_series(folder, turned, (2.5, 2.5, 2.5), origin * [-1, -1, 1])
    return folder


@pytest.mark.slow
def test_a_head_from_slices_is_the_head_from_nifti(head: Path, tmp_path: Path) -> None:
    image = read_ct(head)
    nibabel.save(nibabel.Nifti1Image(image.numpy()[0], np.asarray(image.affine)), tmp_path / "head.nii.gz")
    slices, file = load_head(head), load_head(tmp_path / "head.nii.gz")
    np.testing.assert_array_equal(slices.skull, file.skull)
    np.testing.assert_allclose(slices.affine, file.affine)
    assert 0.02 < slices.occupancy < 0.35


def case(head: Path, folder: Path, kind: str) -> Path:
    shutil.copytree(head, folder)
    names = sorted(path.name for path in folder.iterdir())
    gone = {"twenty missing": range(30, 50), "one missing": [40], "scattered": range(5, 85, 4)}.get(kind, ())
    for k in gone:
        (folder / names[k]).unlink()
    if kind == "doubled":
        shutil.copy(folder / names[40], folder / "again.dcm")
    for k, name in enumerate(names):
        path = folder / name
        if kind in ("two series", "mirrored", "re-spaced", "mr") and path.exists():
            data = pydicom.dcmread(path)
            x, y, z = (float(number) for number in data.ImagePositionPatient)
            if kind == "two series" and k % 2:
                data.SeriesInstanceUID = "1.2.3.9"
            elif kind == "mirrored" and k >= 46:
                data.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]
            elif kind == "re-spaced" and k >= 46:
                data.ImagePositionPatient = [x, y, z + (k - 45) * 1.0]
            elif kind == "mr":
                data.Modality = "MR"
            data.save_as(path)
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("twenty missing", "20 slices are missing where 2.5 mm is the usual step: 52.5 mm from IM0030.dcm to IM0051"),
        ("one missing", "1 slice is missing where 2.5 mm is the usual step: 5 mm from IM0040.dcm to IM0042.dcm"),
        ("scattered", "20 slices are missing"),
        ("doubled", "same position (1 times)"),
        ("two series", "it holds 2 series"),
        ("mirrored", "slices have another orientation"),
        ("re-spaced", "evenly spaced, 2.5 to 3.5 mm"),
        ("mr", "it is MR, and CT is needed"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_the_demo_refuses_each_in_one_line(
    kind: str,
    said: str,
    head: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["demo", "--image", str(case(head, tmp_path / "s", kind)), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["memeff", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(err.strip().splitlines()) == 1
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demo_takes_a_series_by_name_and_interpolates_on_request(head: Path, tmp_path: Path) -> None:
    two = case(head, tmp_path / "two", "whole")
    write_series(two, numbers(), uid="1.2.3.9", prefix="other")
    whole, chosen = load_head(head), load_head(two, series="1.2.3.1")
    assert any("the series 1.2.3.1 was chosen" in note for note in chosen.notes)
    np.testing.assert_array_equal(chosen.skull, whole.skull)
    mended = load_head(case(head, tmp_path / "one", "one missing"), resample=True)
    assert any("interpolated on an even grid" in note for note in mended.notes)
    assert (mended.skull != whole.skull).mean() < 0.002
    with pytest.raises(InputError, match="too wide to interpolate"):
        load_head(case(head, tmp_path / "twenty", "twenty missing"), resample=True)
    with pytest.raises(InputError, match="generated head is no DICOM series"):
        load_head(series="1.2")
    said = report.make_report(mended, [], seed=0, shown=0)
    assert "1 slice is missing" in " ".join(json.loads(report.report_json(said))["notes"])
    assert "interpolated on an even grid" in " ".join(report.report_text(said).split())


def test_a_real_series_with_slices_removed_doubled_mixed_mirrored_and_respaced(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("openjpeg", reason="this series is JPEG 2000, which needs the extra [dicom]")
    source = sorted((data_dir / "totalseg" / "example_ct_dicom").iterdir())

    def changed(name: str, change: Any, leave: Sequence[int] = ()) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for k, path in enumerate(source):
            if k not in leave:
                data = pydicom.dcmread(path)
                change(k, data, folder)
                data.save_as(folder / path.name)
        return folder

    def nothing(*_: Any) -> None: ...

    def double(k: int, data: Any, folder: Path) -> None:
        if k == 7:
            data.save_as(folder / "again")

    def mix(k: int, data: Any, _: Path) -> None:
        data.SeriesInstanceUID = f"1.2.{k % 2}"

    def mirror(k: int, data: Any, _: Path) -> None:
        if k > 10:
            data.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]

    def respace(k: int, data: Any, _: Path) -> None:
        x, y, z = (float(number) for number in data.ImagePositionPatient)
        data.ImagePositionPatient = [x, y, z + (0.4 if k == 9 else 0)]

    assert "1 slice is missing" in refusal(changed("removed", nothing, [7]))
    assert "6 slices are missing" in refusal(changed("more removed", nothing, range(6, 12)))
    assert "same position (1 times)" in refusal(changed("doubled", double))
    assert "it holds 2 series" in refusal(changed("mixed", mix))
    assert "9 of 20 slices have another orientation" in refusal(changed("mirrored", mirror))
    assert "unevenly spaced, 1.6 to 2.4 mm" in refusal(changed("respaced", respace))


def test_every_bundle_reads_through_the_same_door() -> None:
    def loaders(part: Any) -> list[dict[str, Any]]:
        inner = list(part.values()) if isinstance(part, dict) else part if isinstance(part, list) else []
        found = [loader for item in inner for loader in loaders(item)]
        return [part, *found] if isinstance(part, dict) and "LoadImaged" in str(part.get("_target_")) else found

    configs = sorted((Path(__file__).resolve().parents[2] / "bundles").glob("*/configs/*.json"))
    found = [loader for path in configs for loader in loaders(json.loads(path.read_text(encoding="utf-8")))]
    assert len(found) >= 10
    assert {loader.get("reader") for loader in found} == {"monai_memeff.data.VolumeReader"}

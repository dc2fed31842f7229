"""Slices that say something odd are refused by name, and series of any slices are read exactly or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_memeff.data import read_volume
from tests.faults.dicom_files import COUNT, SAGITTAL, numbers, refusal, values, write_series

pytest.importorskip("pydicom", reason="DICOM needs the extra [dicom]")


ODD = {
    "ImagePositionPatient": (None, "has no ImagePositionPatient"),
    "ImageOrientationPatient": ([1, 0, 0, 1, 0, 0], "not at right angles"),
    "PixelSpacing": ([0.7, 0.9], "another pixel spacing"),
    "PhotometricInterpretation": ("MONOCHROME1", "MONOCHROME1"),
    "SamplesPerPixel": (3, "photometric"),
    "BitsStored": (12, "up to bit 15"),
    "RescaleSlope": (0, "RescaleSlope 0"),
    "PixelData": (None, "no pixel data"),
}


@pytest.mark.parametrize("keyword", list(ODD))
def test_one_odd_slice_is_named(keyword: str, tmp_path: Path) -> None:
    value, said = ODD[keyword]

    def change(k: int, data: Any) -> None:
        if k == 4 and value is None:
            delattr(data, keyword)
        elif k == 4:
            setattr(data, keyword, value)

    write_series(tmp_path, numbers(), change=change)
    message = refusal(tmp_path)
    assert said in message
    assert "IM0005.dcm" in message


def test_what_all_slices_may_say_wrongly(tmp_path: Path) -> None:
    def every(**changes: Any) -> Any:
        def change(_: int, data: Any) -> None:
            for keyword, value in changes.items():
                delattr(data, keyword) if value is None else setattr(data, keyword, value)

        return change

    for name, changes, said in (
        ("positions", {"ImagePositionPatient": None}, "has no ImagePositionPatient"),
        ("orientations", {"ImageOrientationPatient": None}, "has no ImageOrientationPatient"),
        ("spacing", {"PixelSpacing": None}, "has no PixelSpacing"),
        ("zero", {"PixelSpacing": [0, 0]}, "must be positive"),
        ("slope", {"RescaleSlope": None, "RescaleIntercept": None}, "its values are not in HU"),
        ("half", {"RescaleIntercept": None}, "has no RescaleIntercept"),
        ("beyond", {"RescaleSlope": "1e37"}, "numbers beyond 3.4e+38"),
        ("scouts", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer images only"),
        ("seg", {"Modality": "SEG"}, "no DICOM images (SEG)"),
        ("bits", {"BitsAllocated": 12}, "12 bits"),
        ("short", {"PixelData": b"\0" * 60}, "cannot be decoded"),
        ("rows", {"Rows": 60000, "Columns": 60000}, "too many"),
    ):
        write_series(tmp_path / name, numbers(), change=every(**changes))
        assert said in refusal(tmp_path / name), name
    write_series(tmp_path / "units", numbers(), change=every(RescaleType="US"))
    assert "units of US" in read_volume(tmp_path / "units").notes[0]
    assert "units of US, and HU is needed" in refusal(tmp_path / "units", modality="CT")
    write_series(tmp_path / "mr", numbers(), change=every(Modality="MR"))
    assert "it is MR, and CT is needed" in refusal(tmp_path / "mr", modality="CT")


def test_another_size_and_several_localizers(tmp_path: Path) -> None:
    volume = numbers()
    write_series(tmp_path, volume)
    write_series(tmp_path, np.zeros((9, 8, 1), np.int16), prefix="X", origin=(-20, -30, 100))
    assert "1 of 13 slices have another size than the others: X0001.dcm" in refusal(tmp_path)

    def scout(_: int, data: Any) -> None:
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    (path,) = write_series(tmp_path, np.zeros((9, 8, 1), np.int16), prefix="X", axes=SAGITTAL, change=scout)
    found = read_volume(tmp_path)
    np.testing.assert_array_equal(values(found), volume)
    assert found.notes == (f"1 localizer images were left out: {path.name}",)
    path.unlink()
    write_series(tmp_path, np.zeros((9, 8, 1), np.int16), prefix="X", axes=SAGITTAL, change=scout, uid="1.2.3.2")
    found = read_volume(tmp_path)
    np.testing.assert_array_equal(values(found), volume)
    assert "1 series of localizer images were left out" in found.notes
    assert "localizer images only" in refusal(tmp_path, series="1.2.3.2")


def test_a_slice_that_is_a_link_to_nothing_is_not_passed_over(tmp_path: Path) -> None:
    """At an end of the volume nothing else would tell that it is missing."""
    *_, path = write_series(tmp_path / "ct", numbers())
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    np.testing.assert_array_equal(values(read_volume(tmp_path / "ct")), numbers())
    (tmp_path / path.name).unlink()
    assert f"{path} is a link to nothing" in refusal(tmp_path / "ct")


def test_files_that_are_no_slices(tmp_path: Path) -> None:
    volume = numbers()
    write_series(tmp_path, volume)
    for name in ("DICOMDIR", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_text("x")
    found = read_volume(tmp_path)
    np.testing.assert_array_equal(values(found), volume)
    assert "3 files that are not slices were left out" in found.notes[0]
    (tmp_path / "IM0013").write_bytes((tmp_path / "IM0012.dcm").read_bytes()[:100])
    assert "cannot read" in refusal(tmp_path)
    assert "IM0013" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "gztar", "bztar", "xztar"])
def test_a_packed_study_is_told_to_be_one(kind: str, tmp_path: Path) -> None:
    """Alone, and among the slices of another."""
    write_series(tmp_path / "slices", numbers(), keep=[0])
    packed = Path(shutil.make_archive(str(tmp_path / "anna"), kind, tmp_path / "slices"))
    write_series(tmp_path / "more", numbers())
    shutil.copy(packed, tmp_path / "more")
    for path in (packed, tmp_path / "more"):
        assert f"{packed.name}: it is a packed file; unpack it, and give the folder" in refusal(path)


def test_folders_in_folders_and_single_slices(tmp_path: Path) -> None:
    volume = numbers()
    write_series(tmp_path / "a" / "b", volume, keep=range(6))
    write_series(tmp_path / "a" / "c", volume, keep=range(6, COUNT))
    np.testing.assert_array_equal(values(read_volume(tmp_path)), volume)
    assert "a single slice" in refusal(tmp_path / "a" / "b" / "IM0001.dcm")
    (tmp_path / "none").mkdir()
    assert "is empty" in refusal(tmp_path / "none")
    assert "no such image" in refusal(tmp_path / "absent")
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "ct.nii")
    assert "is no DICOM series" in refusal(tmp_path / "ct.nii", series="1.2")
    assert "is no DICOM series" in refusal(tmp_path / "ct.nii", resample=True)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.slow
def test_a_random_choice_of_slices_is_read_exactly_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The oracle is plain: the kept slices are one volume where their numbers have one step, whatever was done."""
    folder = tmp_path_factory.mktemp("series")
    count = data.draw(st.integers(2, 8))
    keep = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=2)))
    moved = {k: data.draw(st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.004, 0.3, -0.8, 1.5])) for k in keep}
    volume = numbers(count)
    places = np.array([[-20.0, -30.0, 40 + 1.5 * k + moved.get(k, 0.0)] for k in range(count)])
    write_series(folder, volume, keep=keep, positions=places)
    heights = places[keep, 2]
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    rising = np.array_equal(order, np.arange(len(keep)))
    even = np.allclose(heights[order], np.linspace(heights.min(), heights.max(), len(keep)), atol=0.01)
    if rising and even and steps.min() > 0.001:
        found = read_volume(folder)
        np.testing.assert_array_equal(values(found), volume[..., keep])
        assert float(found.image.affine[2, 2]) == pytest.approx(np.ptp(heights) / (len(keep) - 1), abs=1e-6)
        return
    loose = max(0.01, 0.01 * float(np.median(steps))) + 1e-6  # the tolerance, where the step is wider
    if rising and np.abs(heights - np.linspace(heights[0], heights[-1], len(keep))).max() <= loose:
        return
    assert refusal(folder)

"""Series that are not one regular stack are refused by the names of their slices, or mended exactly and in words."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import LoadImage

from monai_memeff import cli
from monai_memeff.apps.skull.demo import report
from monai_memeff.apps.skull.demo.io import read_ct
from monai_memeff.apps.skull.demo.volume import load_head
from monai_memeff.apps.skull.phantom import head_phantom
from monai_memeff.data import ReadVolume, VolumeReader, read_volume
from monai_memeff.errors import InputError
from tests.faults.dicom_files import AXIAL, write_multiframe, write_series

pydicom = pytest.importorskip("pydicom", reason="DICOM needs the extra [dicom]")
COUNT = 12
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
TURN = np.radians(20)
OBLIQUE = (float(np.cos(TURN)), float(np.sin(TURN)), 0.0, 0.0, 0.0, -1.0)


def numbers(count: int = COUNT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 2000, (9, 7, count)).astype(np.int16)


def values(volume: ReadVolume) -> np.ndarray:
    return volume.image.as_tensor().numpy()[0]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 700
    return message


# Right


@pytest.mark.parametrize("axes", [AXIAL, SAGITTAL, OBLIQUE, (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)])
@pytest.mark.parametrize("order", ["up", "down", "shuffled names"])
def test_a_regular_stack_is_read_exactly(axes: Sequence[float], order: str, tmp_path: Path) -> None:
    def change(k: int, data: Any) -> None:
        data.InstanceNumber = COUNT - k if order == "down" else k + 1

    volume = numbers()
    written = write_series(tmp_path / "s", volume, axes=axes, change=change)
    if order == "shuffled names":
        for k, path in enumerate(written):
            path.rename(path.with_name(f"{(k * 5) % COUNT:03}"))
    found = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(values(found), volume)
    expected = np.eye(4)
    normal = np.cross(axes[:3], axes[3:])
    expected[:3, :3] = np.stack([0.8 * np.array(axes[:3]), 0.7 * np.array(axes[3:]), 1.5 * normal], axis=1)
    expected[:3, 3] = (-20, -30, 40)
    np.testing.assert_allclose(found.image.affine, np.diag([-1, -1, 1, 1]) @ expected, atol=1e-6)
    assert found.notes == ()


def test_every_slice_has_its_own_slope(tmp_path: Path) -> None:
    def change(k: int, data: Any) -> None:
        data.RescaleSlope, data.RescaleIntercept = 0.5 + k, -1024 + k

    volume = numbers()
    write_series(tmp_path, volume, change=change)
    expected = volume * (0.5 + np.arange(COUNT)) + (-1024 + np.arange(COUNT))
    np.testing.assert_array_equal(values(read_volume(tmp_path)), expected.astype(np.float32))


def test_a_multiframe_file_is_read_by_its_positions(tmp_path: Path) -> None:
    volume, heights, slopes = numbers(5), [46.0, 40, 42, 48, 44], [1.0, 2, 3, 4, 5]
    write_multiframe(tmp_path / "mf.dcm", volume, heights, slopes)
    expected = (volume * np.array(slopes))[..., np.argsort(heights)]
    for path in (tmp_path, tmp_path / "mf.dcm"):
        found = read_volume(path)
        np.testing.assert_array_equal(values(found), expected)
        assert found.image.affine[2, 2] == 2
        assert found.image.affine[2, 3] == 40
    write_multiframe(tmp_path / "mf.dcm", volume, [40, 42, 44, 48, 50], slopes)
    assert "1 slice is missing" in refusal(tmp_path)
    assert "frame 3 of mf.dcm to frame 4 of mf.dcm" in refusal(tmp_path)


def test_real_series_agree_with_other_readers(data_dir: Path) -> None:
    pytest.importorskip("openjpeg", reason="this series is JPEG 2000, which needs the extra [dicom]")
    folder = data_dir / "totalseg" / "example_ct_dicom"
    found = read_volume(folder)
    theirs = LoadImage("PydicomReader", ensure_channel_first=True)(folder)  # it begins at the other end
    assert torch.equal(found.image.as_tensor(), theirs.as_tensor().flip(-1))
    moved = theirs.affine.clone()
    moved[:3, 3] += 19 * moved[:3, 2]
    moved[:3, 2] *= -1
    torch.testing.assert_close(found.image.affine, moved)
    mask = nibabel.load(data_dir / "totalseg" / "example_seg_dicom.nii.gz")
    corners = [np.abs(np.asarray(image.affine)[:3, :3]).sum(axis=0) for image in (found.image, mask)]
    np.testing.assert_allclose(np.sort(corners[0]), np.sort(corners[1]), rtol=1e-3)


def test_real_multiframe_files_agree_with_their_slices(data_dir: Path) -> None:
    for name in ("23x38x3", "24x38x3"):
        folder = data_dir / "dicom" / "dcmqi_segmentations" / name
        slices, frames = read_volume(folder / "image"), read_volume(folder / "multiframe")
        assert torch.equal(slices.image.as_tensor(), frames.image.as_tensor())
        torch.testing.assert_close(slices.image.affine, frames.image.affine)


# Wrong: removed, doubled, mixed, mirrored, re-spaced


@pytest.mark.parametrize("gone", [[5], [3, 8], [4, 5], [2, 3, 4, 5, 6], [1, 3, 4, 9]])
def test_missing_slices_are_named(gone: list[int], tmp_path: Path) -> None:
    write_series(tmp_path, numbers(), keep=[k for k in range(COUNT) if k not in gone])
    message = refusal(tmp_path)
    counted = "1 slice is" if len(gone) == 1 else f"{len(gone)} slices are"
    assert f"{counted} missing where 1.5 mm is the usual step" in message
    first = gone[0]
    assert f"from IM{first:04}.dcm to IM" in message
    assert "--resample" in message


def test_stacks_that_are_even_again_are_taken(tmp_path: Path) -> None:
    volume = numbers()
    for name, keep in (("ends", range(2, 10)), ("every second", range(0, COUNT, 2)), ("two", (4, 9))):
        write_series(tmp_path / name, volume, keep=list(keep))
        found = read_volume(tmp_path / name)
        np.testing.assert_array_equal(values(found), volume[..., list(keep)])
        assert float(found.image.affine[2, 2]) == pytest.approx(1.5 * (keep[1] - keep[0]))


def test_doubled_slices_are_named(tmp_path: Path) -> None:
    (first, *_) = write_series(tmp_path, numbers())
    shutil.copy(tmp_path / "IM0005.dcm", tmp_path / "copy.dcm")
    assert "same position (1 times): IM0005.dcm, copy.dcm" in refusal(tmp_path).replace(
        "copy.dcm, IM0005.dcm", "IM0005.dcm, copy.dcm"
    )
    assert first.exists()
    assert "same position" in refusal(tmp_path, resample=True)


def test_several_series_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    first, second = numbers(), numbers(8, seed=1)
    write_series(tmp_path, first, uid="1.2.3.1", prefix="A")
    write_series(tmp_path, second, uid="1.2.3.2", prefix="B", origin=(-20, -30, 40.75))
    message = refusal(tmp_path)
    assert "it holds 2 series" in message
    assert "1.2.3.1 (CT, 12 files); 1.2.3.2 (CT, 8 files)" in message
    assert "--series" in message
    for uid, expected in (("1.2.3.1", first), ("1.2.3.2", second)):
        found = read_volume(tmp_path, series=uid)
        np.testing.assert_array_equal(values(found), expected)
        assert any(f"the series {uid} was chosen" in note for note in found.notes)
        assert any("files of other series were left out" in note for note in found.notes)
    assert "holds no series 9.9" in refusal(tmp_path, series="9.9")


def test_series_mixed_under_one_name_are_refused(tmp_path: Path) -> None:
    volume = numbers()

    def other(keyword: str, value: Any) -> Any:
        return lambda k, data: setattr(data, keyword, value) if k % 2 else None

    for keyword, value in (
        ("ConvolutionKernel", "B70"), ("FrameOfReferenceUID", "1.9"), ("StudyInstanceUID", "1.8"), ("PatientID", "Q"),
        ("KVP", 80), ("EchoTime", 30),
    ):  # fmt: skip
        write_series(tmp_path / keyword, volume, change=other(keyword, value))
        assert f"6 of 12 slices have another {keyword}" in refusal(tmp_path / keyword, resample=True)
    write_series(tmp_path / "modality", volume, change=other("Modality", "MR"))
    assert "one series holds CT, MR" in refusal(tmp_path / "modality")


def test_time_points_and_echoes_are_counted(tmp_path: Path) -> None:
    for part in range(3):

        def change(k: int, data: Any, part: int = part) -> None:
            data.TemporalPositionIdentifier, data.SOPInstanceUID = part + 1, f"1.5.{part}.{k}"

        write_series(tmp_path, numbers(seed=part), prefix=f"T{part}-", change=change)
    message = refusal(tmp_path, resample=True)
    assert "the series holds 3 volumes" in message
    assert "TemporalPositionIdentifier" in message


def test_mirrored_halves_are_refused(tmp_path: Path) -> None:
    volume, half = numbers(), COUNT // 2

    def orientation(k: int, data: Any) -> None:
        if k >= half + 1:
            data.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]

    write_series(tmp_path / "axes", volume, change=orientation)
    assert "5 of 12 slices have another orientation" in refusal(tmp_path / "axes", resample=True)
    turned = np.array([[-20, -30, 40 + 1.5 * k] for k in [*range(half), *range(COUNT - 1, half - 1, -1)]])
    write_series(tmp_path / "places", volume, positions=turned)
    assert "contradict their InstanceNumber" in refusal(tmp_path / "places", resample=True)
    below = np.array([[-20, -30, 1.5 * abs(k - half) + 40] for k in range(COUNT)])
    write_series(tmp_path / "folded", volume, positions=below)
    assert "same position" in refusal(tmp_path / "folded")

    def locations(k: int, data: Any) -> None:
        data.SliceLocation = 1.5 * (k if k < half else COUNT + half - k)
        del data.InstanceNumber

    write_series(tmp_path / "locations", volume, change=locations)
    assert "contradict their SliceLocation" in refusal(tmp_path / "locations")


def test_uneven_steps_are_named_and_interpolated_on_request(tmp_path: Path) -> None:
    heights = 40 + np.array([0, 1.5, 3, 4.5, 6, 6.9, 9, 10.5, 12, 13.5, 15, 16.5])
    ramp = np.broadcast_to(np.round(10 * heights).astype(np.int16), (9, 7, COUNT))
    write_series(tmp_path, ramp, positions=np.stack([np.full(COUNT, -20), np.full(COUNT, -30), heights], axis=1))
    message = refusal(tmp_path)
    assert "unevenly spaced, 0.9 to 2.1 mm" in message
    assert "from IM0005.dcm to IM0006.dcm" in message
    found = read_volume(tmp_path, resample=True)
    assert "interpolated on an even grid of 12 planes, 1.5 mm apart" in found.notes[0]
    expected = 10 * (40 + 1.5 * np.arange(12))  # a ramp in space is a ramp again
    np.testing.assert_allclose(values(found)[3, 2], expected, atol=1e-3)
    for k in (0, 1, 2, 3, 4, 6, 11):
        np.testing.assert_array_equal(values(found)[..., k], ramp[..., k])


def test_a_missing_slice_is_interpolated_on_request_and_a_hole_never(tmp_path: Path) -> None:
    volume = numbers()
    write_series(tmp_path / "one", volume, keep=[k for k in range(COUNT) if k != 5])
    found = read_volume(tmp_path / "one", resample=True)
    kept = [k for k in range(COUNT) if k != 5]
    np.testing.assert_array_equal(values(found)[..., kept], volume[..., kept])
    np.testing.assert_allclose(values(found)[..., 5], (volume[..., 4] / 2 + volume[..., 6] / 2), atol=1e-3)
    assert "1 slice is missing" in found.notes[0]
    write_series(tmp_path / "hole", volume, keep=[0, 1, 2, 3, 8, 9, 10, 11])
    assert "a gap too wide to interpolate: 7.5 mm from IM0004.dcm to IM0009.dcm" in refusal(
        tmp_path / "hole", resample=True
    )
    write_series(tmp_path / "whole", volume)
    assert read_volume(tmp_path / "whole", resample=True).notes == ()


@pytest.mark.parametrize("shift", [0.7, 0.35, 0.2])
def test_a_tilted_gantry_is_refused_or_made_upright(shift: float, tmp_path: Path) -> None:
    """A scene that is linear in space stays the same scene on the upright grid."""
    k = np.arange(COUNT)
    places = np.stack([np.full(COUNT, -20.0), -30.0 + shift * k, 40 + 1.5 * k], axis=1)
    x, y, z = (-20 + 0.8 * np.arange(9))[:, None, None], 0.7 * np.arange(7)[None, :, None], 40 + 1.5 * k
    scene = 7 * x + 11 * (y - 30 + shift * k) + 5 * z

    def change(_: int, data: Any) -> None:
        data.RescaleSlope, data.RescaleIntercept = 0.1, 0

    write_series(tmp_path, np.round(10 * scene).astype(np.int16), positions=places, change=change)
    assert f"tilted against its slices by {np.degrees(np.arctan(shift / 1.5)):.2f} degrees" in refusal(tmp_path)
    found = read_volume(tmp_path, resample=True)
    affine = np.asarray(found.image.affine)
    i = np.stack(np.meshgrid(*(np.arange(n) for n in values(found).shape), indexing="ij"), axis=-1)
    world = (i @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]
    inside = values(found) > values(found).min() + 0.06
    assert inside.sum() >= 9 * 6 * COUNT - 9
    assert np.abs(values(found) - world @ [7, 11, 5])[inside].max() < 0.06
    assert np.abs(affine[:3, :3] - np.diag(np.diag(affine[:3, :3]))).max() < 1e-9


def test_slices_shifted_sideways_are_named(tmp_path: Path) -> None:
    places = np.array([[-20.0 + (2.4 if k == 7 else 0), -30, 40 + 1.5 * k] for k in range(COUNT)])
    volume = numbers()
    write_series(tmp_path, volume, positions=places)
    assert "shifted sideways, IM0008.dcm by 2.4 mm" in refusal(tmp_path)
    found = read_volume(tmp_path, resample=True)  # 2.4 mm are three columns
    assert values(found).shape == (12, 7, COUNT)
    np.testing.assert_array_equal(values(found)[3:, :, 7], volume[..., 7])
    np.testing.assert_array_equal(values(found)[:9, :, 6], volume[..., 6])


# Wrong: what a slice says


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


def test_files_that_are_no_slices(tmp_path: Path) -> None:
    volume = numbers()
    write_series(tmp_path, volume)
    for name in ("DICOMDIR", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_text("x")
    found = read_volume(tmp_path)
    np.testing.assert_array_equal(values(found), volume)
    assert "3 files that are no slices were left out" in found.notes[0]
    (tmp_path / "IM0013").write_bytes((tmp_path / "IM0012.dcm").read_bytes()[:100])
    assert "cannot read" in refusal(tmp_path)
    assert "IM0013" in refusal(tmp_path)


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


# MONAI's pipelines and the command line


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

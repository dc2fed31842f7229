"""Series that are not one regular stack are refused by the names of their slices, or mended exactly and in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monai_memeff.data import read_volume
from tests.faults.dicom_files import COUNT, numbers, refusal, values, write_series

pytest.importorskip("pydicom", reason="DICOM needs the extra [dicom]")


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


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize(("keyword", "kinds"), [("AcquisitionNumber", (1, 2)), ("ImageType", (["A"], ["B"]))])
def test_acquisitions_that_lie_between_each_other_are_refused(
    keyword: str, kinds: tuple[Any, Any], numbered: bool, tmp_path: Path
) -> None:
    """Each is numbered by itself, so that numbers say nothing; one after the other is how scanners step."""

    def change(which: Callable[[int], int]) -> Callable[[int, Any], None]:
        def changed(k: int, data: Any) -> None:
            setattr(data, keyword, kinds[which(k)])
            if numbered:
                data.InstanceNumber = k // 2 + 1
            else:
                del data.InstanceNumber

        return changed

    write_series(tmp_path / "mixed", numbers(), change=change(lambda k: k % 2))
    message = refusal(tmp_path / "mixed", resample=True)
    assert f"slices with the {keyword}" in message
    assert "IM0001.dcm beside IM0002.dcm" in message
    volume = numbers()
    write_series(tmp_path / "steps", volume, change=change(lambda k: k // 6))
    np.testing.assert_array_equal(values(read_volume(tmp_path / "steps")), volume)


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

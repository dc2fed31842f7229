"""Regular series are read exactly, as other readers read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage

from monai_memeff.data import read_volume
from tests.faults.dicom_files import AXIAL, COUNT, SAGITTAL, numbers, refusal, values, write_multiframe, write_series

pytest.importorskip("pydicom", reason="DICOM needs the extra [dicom]")
TURN = np.radians(20)
OBLIQUE = (float(np.cos(TURN)), float(np.sin(TURN)), 0.0, 0.0, 0.0, -1.0)


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
    write_multiframe(tmp_path / "mf.dcm", volume, heights, slopes)
    _give_echoes(tmp_path / "mf.dcm")
    assert "slices have another EffectiveEchoTime" in refusal(tmp_path)
    write_multiframe(tmp_path / "mf.dcm", volume, [40, 42, 44, 48, 50], slopes)
    assert "1 slice is missing" in refusal(tmp_path)
    assert "frame 3 of mf.dcm to frame 4 of mf.dcm" in refusal(tmp_path)


def _give_echoes(path: Path) -> None:
    """Say that every second frame is of another echo, where an enhanced MR says it."""
    from pydicom import dcmread
    from pydicom.dataset import Dataset

    data = dcmread(path)
    for number, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        echo = Dataset()
        echo.EffectiveEchoTime = 10.0 + 20 * (number % 2)
        group.MREchoSequence = [echo]
    data.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    "syntax", ["RLELossless", "JPEGLSLossless", "JPEGLSNearLossless", "DeflatedExplicitVRLittleEndian"]
)
def test_packed_pixels_are_exact_or_said_to_be_not(syntax: str, tmp_path: Path) -> None:
    """No header speaks of loss."""
    import pydicom

    if "JPEGLS" in syntax:
        pytest.importorskip("jpeg_ls", reason="packing needs pyjpegls")
    volume = numbers(3)
    for file in write_series(tmp_path, volume):
        data = pydicom.dcmread(file)
        if syntax.startswith("Deflated"):
            data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
            data.save_as(file)
            continue
        options: Any = {"jls_error": 3} if "Near" in syntax else {}
        data.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False, **options)
        data.pop("LossyImageCompression", None)
        data.save_as(file)
    found = read_volume(tmp_path)
    near = "Near" in syntax
    assert np.array_equal(values(found), volume) != near
    assert any("compressed with loss" in note for note in found.notes) == near


@pytest.mark.slow
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

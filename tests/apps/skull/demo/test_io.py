"""Every bad image is refused in one line that says the limit, the value and the way out."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.apps.skull.demo.io import InputError, check_bone, check_size, read_ct
from monai_memeff.apps.skull.demo.volume import load_head, prepare_head


def _save(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def _shell(edge: int = 70, spacing: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    """A hollow ball of bone in air, and its affine."""
    x = np.linspace(-1, 1, edge)
    r = np.sqrt(x[:, None, None] ** 2 + x[None, :, None] ** 2 + x[None, None, :] ** 2)
    values = np.where((r < 0.85) & (r > 0.75), 1000, -1000).astype(np.float32)
    return values, np.diag([spacing, spacing, spacing, 1.0])


def _refusal(call: object, *arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 400
    return message


def test_a_whole_image_is_read_with_its_geometry(tmp_path: Path, skewed: np.ndarray) -> None:
    values = np.random.default_rng(0).integers(-1000, 2000, (64, 70, 66)).astype(np.int16)
    image = read_ct(_save(tmp_path / "ct.nii.gz", values, skewed))
    assert image.shape == (1, 64, 70, 66)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image[0].numpy(), values)
    np.testing.assert_allclose(image.affine, skewed, atol=1e-5)


def test_files_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = _save(tmp_path / "good.nii.gz", _shell()[0])
    whole = good.read_bytes()
    (tmp_path / "half.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.nii.gz").write_bytes(b"")
    (tmp_path / "text.nii").write_text("not an image " * 50)
    (tmp_path / "plain.txt").write_text("not an image")
    (tmp_path / "folder").mkdir()
    assert "no such image" in _refusal(read_ct, tmp_path / "missing.nii.gz")
    assert "empty" in _refusal(read_ct, tmp_path / "none.nii.gz")
    assert "empty" in _refusal(read_ct, tmp_path / "folder")
    for name in ("half.nii.gz", "text.nii", "plain.txt"):
        assert "cannot read" in _refusal(read_ct, tmp_path / name)
    assert capfd.readouterr().err == ""


def test_images_of_the_wrong_shape(tmp_path: Path) -> None:
    zeros = np.zeros((70, 70, 70, 2), np.float32)
    assert "is 2D" in _refusal(read_ct, _save(tmp_path / "a.nii", zeros[:, :, 0, 0]))
    assert "70 x 70 x 1 " in _refusal(read_ct, _save(tmp_path / "b.nii", zeros[:, :, :1, 0]))
    assert "2 volumes" in _refusal(read_ct, _save(tmp_path / "c.nii", zeros))
    assert "at least 64" in _refusal(read_ct, _save(tmp_path / "d.nii", zeros[:, :63, :, 0]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_numbers(tmp_path: Path, value: float) -> None:
    values, affine = _shell()
    values[3, 4, 5] = values[6, 7, 8] = value
    assert "2 voxels that are NaN or infinite" in _refusal(read_ct, _save(tmp_path / "a.nii", values, affine))


def test_affines_that_cannot_be_a_head(tmp_path: Path) -> None:
    values, _ = _shell()
    image = MetaTensor(torch.from_numpy(values)[None], affine=torch.diag(torch.tensor([1.0, 1.0, 12.0, 1.0])))
    assert "12 mm" in _refusal(prepare_head, image)
    flat = np.eye(4)
    flat[2] = [1, 0, 0, 0]
    image.affine = torch.from_numpy(flat)
    assert "singular" in _refusal(prepare_head, image)


def test_bone_that_is_nowhere_or_everywhere(tmp_path: Path) -> None:
    values, affine = _shell()
    empty = _refusal(load_head, _save(tmp_path / "a.nii", np.full_like(values, 40.0), affine))
    assert "no voxel above 300 HU (largest value 40)" in empty
    assert "--threshold" in empty
    assert "100%" in _refusal(load_head, _save(tmp_path / "b.nii", np.full_like(values, 900.0), affine))
    assert "100%" in _refusal(load_head, _save(tmp_path / "c.nii", values, affine), 64, -2000.0)
    assert check_bone(values, 300.0).sum() == (values > 300).sum()


def test_an_image_that_is_no_ct_needs_a_threshold(tmp_path: Path) -> None:
    values, affine = _shell()
    mri = _save(tmp_path / "mr.nii", np.where(values > 0, 900.0, 20.0 + values / 100).astype(np.float32), affine)
    said = _refusal(load_head, mri)
    assert "mr.nii is no CT in Hounsfield units" in said
    assert "--threshold" in said
    head = load_head(mri, 64, 300.0)
    assert any("may not be in Hounsfield units, but --threshold was given" in note for note in head.notes)
    shifted = _save(tmp_path / "shifted.nii", values + 1024, affine)  # a CT without its intercept: bone is not at 300
    assert "no CT in Hounsfield units" in _refusal(load_head, shifted)


@pytest.mark.parametrize("threshold", [np.nan, np.inf, -np.inf])
def test_a_threshold_that_is_no_number(tmp_path: Path, threshold: float) -> None:
    values, affine = _shell()
    assert "--threshold" in _refusal(load_head, _save(tmp_path / "a.nii", values, affine), 64, threshold)


def test_bone_of_the_wrong_size(tmp_path: Path) -> None:
    values, _ = _shell()
    assert "check the spacing" in _refusal(load_head, _save(tmp_path / "a.nii", values, np.diag([0.5, 0.5, 0.5, 1])))
    assert "check the spacing" in _refusal(load_head, _save(tmp_path / "b.nii", values, np.diag([7.5, 7.5, 7.5, 1])))


def test_a_grid_that_noise_fills(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 1000, (70, 70, 70)).astype(np.float32)
    path = _save(tmp_path / "a.nii", noise, np.diag([1.5, 1.5, 1.5, 1]))
    assert "of the grid" in _refusal(load_head, path)


@pytest.mark.parametrize("size", [0, 32, 65, 528, -64])
def test_grids_that_the_network_cannot_use(size: int) -> None:
    assert f"got {size}" in _refusal(check_size, size)
    assert check_size(64) == 64


@pytest.mark.slow
def test_a_dicom_folder_is_read_and_a_broken_one_refused(data_dir: Path) -> None:
    pytest.importorskip("pydicom", reason="DICOM needs the extra [dicom]")
    pytest.importorskip("openjpeg", reason="this series is JPEG 2000, which needs the extra [dicom]")
    assert "512 x 512 x 20 voxels" in _refusal(read_ct, data_dir / "totalseg" / "example_ct_dicom")
    assert "cannot read" in _refusal(read_ct, data_dir / "dicom" / "bad")
    assert "cannot read" in _refusal(read_ct, data_dir / "dicom" / "bad" / "MR_truncated.dcm")

"""Writers with odd numbers: every value is stored exactly, or the volume, affine or mesh is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from monai_memeff.data import LabelFile, open_nifti, read_volume, save_nifti
from monai_memeff.occupancy import SurfaceMesh, labels_to_mesh, logits_to_mesh, write_mesh

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
NUMBERS = np.arange(60).reshape(3, 4, 5)
NUMPY = ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">i2", ">u4", ">i8", ">f2", ">f8")
TORCH = (
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int64,
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn,
)  # fmt: skip
BROKEN = (
    np.full((4, 4), np.nan), np.diag([1.0, np.inf, 1, 1]), np.diag([1.0, 0, 1, 1]), np.eye(3), None, "affine",
)  # fmt: skip


def stored(path: Path) -> list[Any]:
    assert np.array_equal(open_nifti(path).affine, AFFINE)
    return np.asarray(nibabel.load(path).dataobj).ravel().tolist()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", NUMPY)
def test_numbers_of_numpy_are_stored_exactly(kind: str, ending: str, tmp_path: Path) -> None:
    values = NUMBERS.astype(kind)
    save_nifti(tmp_path / f"x{ending}", values, AFFINE)
    assert stored(tmp_path / f"x{ending}") == values.ravel().tolist()


@pytest.mark.parametrize("kind", TORCH, ids=str)
def test_numbers_of_torch_are_stored_exactly(kind: torch.dtype, tmp_path: Path) -> None:
    values = torch.from_numpy(NUMBERS % 13).to(kind)
    save_nifti(tmp_path / "x.nii", values, torch.from_numpy(AFFINE))
    wanted = values.double() if values.is_floating_point() else values
    assert stored(tmp_path / "x.nii") == wanted.flatten().tolist()


@pytest.mark.parametrize("values", [NUMBERS + 2**40, NUMBERS - 2**62, NUMBERS.astype("u8") + np.uint64(2**63)])
def test_integers_that_need_64_bits_keep_them(values: np.ndarray, tmp_path: Path) -> None:
    save_nifti(tmp_path / "x.nii", values, AFFINE)
    assert stored(tmp_path / "x.nii") == values.ravel().tolist()
    with pytest.raises(ValueError, match="and float32, in which volumes are computed"):
        read_volume(tmp_path / "x.nii")


@pytest.mark.parametrize("values", [NUMBERS * 1j, NUMBERS.astype(object), NUMBERS.astype("U3"), NUMBERS.astype("g")])
def test_what_is_no_real_number_of_64_bits_is_refused(values: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a volume of real numbers of up to 64 bits is written, got \S+: convert"):
        save_nifti(tmp_path / "x.nii", values, AFFINE)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (4, 5), (1, 3, 4, 5), ()])
def test_a_volume_without_voxels_or_with_other_axes_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a volume \(H, W, D\) with voxels is written"):
        save_nifti(tmp_path / "x.nii", np.zeros(shape, np.int64), AFFINE)
    with pytest.raises(ValueError, match=r"^(a volume \(H, W, D\) with voxels is written|shape must be)"):
        LabelFile(tmp_path / "y.nii", shape, AFFINE)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("affine", BROKEN, ids=lambda value: str(np.shape(value)))
def test_an_affine_that_leads_nowhere_is_refused_before_anything_is_written(affine: Any, tmp_path: Path) -> None:
    for write in (
        lambda: save_nifti(tmp_path / "x.nii", NUMBERS, affine),
        lambda: LabelFile(tmp_path / "y.nii", (3, 4, 5), affine),
        lambda: labels_to_mesh(box(), affine),
    ):
        with pytest.raises(ValueError, match="ffine") as refusal:
            write()
        assert "\n" not in str(refusal.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".Nii", ".nii.GZ", ".niI"])
def test_a_name_that_readers_do_not_find_again_is_refused(ending: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written as .nii or .nii.gz"):
        save_nifti(tmp_path / f"x{ending}", NUMBERS, AFFINE)
    for name in ("X.NII", "X.NII.GZ"):
        save_nifti(tmp_path / name, NUMBERS, AFFINE)
        assert stored(tmp_path / name) == NUMBERS.ravel().tolist()


def box() -> Tensor:
    labels = torch.zeros(5, 6, 5)
    labels[1:3, 1:4, 1:3] = 1
    return labels


@pytest.mark.parametrize("kind", TORCH, ids=str)
def test_a_mesh_is_the_same_of_every_dtype(kind: torch.dtype) -> None:
    expected = labels_to_mesh(box(), AFFINE)
    found = labels_to_mesh(box().to(kind), AFFINE)
    assert np.array_equal(found.vertices, expected.vertices)
    assert np.array_equal(found.faces, expected.faces)


def test_the_background_is_a_label_too_and_other_byte_orders_are_read() -> None:
    outside = labels_to_mesh(box(), AFFINE, label=0)
    assert outside.volume > labels_to_mesh(box().numpy().astype(">i2")[::-1], AFFINE).volume > 0
    with pytest.raises(ValueError, match="label 2 is empty"):
        labels_to_mesh(box(), AFFINE, label=2)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool])
def test_integers_are_no_logits_for_a_mesh(kind: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"logits are floating-point numbers, got .*; labels_to_mesh takes label maps"):
        logits_to_mesh(torch.stack([1 - box(), box()]).to(kind), AFFINE)  # in uint8 0 - 1 would be 255: inside


@pytest.mark.parametrize("vertex", [np.nan, np.inf, 1e39])
def test_a_mesh_with_vertices_that_float32_lacks_is_not_written(vertex: float, tmp_path: Path) -> None:
    mesh = SurfaceMesh(np.array([[0.0, 0, 0], [1, 0, 0], [0, vertex, 0]]), np.array([[0, 1, 2]]))
    with pytest.raises(ValueError, match="vertices of a mesh must be finite"):
        write_mesh(tmp_path / "x.stl", mesh)
    assert not any(tmp_path.iterdir())

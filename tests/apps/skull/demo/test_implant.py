"""An implant in the CT's own geometry and as a surface: it fits, it is closed, and its volume is the bone's."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.apps.skull.demo import implant as shapes
from monai_memeff.apps.skull.demo.volume import prepare_head, resample_to_grid
from monai_memeff.occupancy import SurfaceMesh, write_mesh
from tests.apps.skull.demo.conftest import Case


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def _volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


def _read_stl(path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    raw = path.read_bytes()
    (count,) = struct.unpack("<I", raw[80:84])
    assert len(raw) == 84 + 50 * count
    record = np.frombuffer(raw[84:], dtype=[("n", "<f4", 3), ("p", "<f4", (3, 3)), ("a", "<u2")])
    return raw[:80], record["n"], record["p"]


@pytest.fixture(scope="module")
def shape(case: Case) -> tuple[np.ndarray, np.ndarray]:
    return shapes.implant_field(case.head, case.defective, case.truth)


def test_defective_bone_loses_the_bone_of_the_cut_cells(case: Case) -> None:
    remaining = shapes.defective_bone(case.head, case.defective)
    removed = case.head.bone & ~remaining
    assert not (remaining & ~case.head.bone).any()
    world = np.argwhere(removed) @ case.head.ct_affine[:3, :3].T + case.head.ct_affine[:3, 3]
    index = np.rint((world - case.head.affine[:3, 3]) / case.head.cell_mm).astype(int)
    assert case.truth[tuple(index.T)].all()
    assert removed.sum() * 2.5**3 == pytest.approx(case.truth.sum() * case.head.cell_mm**3 * case.head.fill, rel=0.2)
    np.testing.assert_array_equal(shapes.defective_bone(case.head, case.head.skull), case.head.bone)


def test_the_true_cells_give_back_the_true_bone(case: Case, shape: tuple[np.ndarray, np.ndarray]) -> None:
    remaining = shapes.defective_bone(case.head, case.defective)
    removed = case.head.bone & ~remaining
    drawn = shapes.implant_in_ct(case.head, *shape, remaining)
    assert drawn.shape == case.head.bone.shape
    assert not (drawn & remaining).any()
    nearest = (
        resample_to_grid(case.truth.astype(np.float32), case.head.affine, case.head.ct_affine, drawn.shape, order=0)
        > 0.5
    )
    assert _dice(drawn, removed) > max(0.85, _dice(nearest & ~remaining, removed))


@pytest.mark.slow
def test_an_oblique_ct_gets_its_implant_in_place(case: Case, skewed: np.ndarray, ct: MetaTensor) -> None:
    values = resample_to_grid(ct[0].numpy() + 1000, np.asarray(ct.affine), skewed, (120, 110, 96)) - 1000
    head = prepare_head(MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(skewed)), size=64)
    ball = (
        resample_to_grid(case.truth.astype(np.float32), case.head.affine, head.affine, head.skull.shape, order=0) > 0.5
    )
    truth = head.skull & ball
    defective = head.skull & ~truth
    field, affine = shapes.implant_field(head, defective, truth)
    remaining = shapes.defective_bone(head, defective)
    drawn = shapes.implant_in_ct(head, field, affine, remaining)
    assert _dice(drawn, head.bone & ~remaining) > 0.8
    center = skewed[:3, :3] @ np.argwhere(drawn).mean(axis=0) + skewed[:3, 3]
    vertices, _ = shapes.implant_mesh(field, affine)
    np.testing.assert_allclose(vertices.mean(axis=0), center, atol=2.5)


@pytest.mark.slow
def test_the_surface_is_closed_and_outwards(shape: tuple[np.ndarray, np.ndarray]) -> None:
    vertices, faces = shapes.implant_mesh(*shape)
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    there = {tuple(edge) for edge in directed.tolist()}
    assert len(there) == len(directed), "no edge is run twice the same way"
    assert all((b, a) in there for a, b in there), "every edge is run back by its neighbor"
    cell = float(np.prod(np.diagonal(shape[1])[:3]))
    assert _volume(vertices, faces) == pytest.approx((shape[0] > 0).sum() * cell, rel=0.03)


def test_a_ball_has_the_surface_of_a_ball() -> None:
    index = np.stack(np.meshgrid(*(np.arange(30.0),) * 3, indexing="ij"), axis=-1)
    field = (10 - np.linalg.norm(index - 14.3, axis=-1)).astype(np.float32)
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])  # a flip must not turn the surface inside out
    vertices, faces = shapes.implant_mesh(field, affine)
    assert _volume(vertices, faces) == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.02)
    np.testing.assert_allclose(np.linalg.norm(vertices - np.diagonal(affine)[:3] * 14.3, axis=1), 20, atol=0.15)
    field[14, 14, 14] = -1  # a cavity is filled
    field[0, 0, 0] = 1  # a crumb is dropped, though it touches the border
    again, _ = shapes.implant_mesh(field, affine)
    np.testing.assert_allclose(np.sort(again, axis=0), np.sort(vertices, axis=0), atol=1e-5)


def test_an_implant_at_the_border_of_its_grid_is_closed_too() -> None:
    _, faces = shapes.implant_mesh(np.ones((4, 5, 6), np.float32), np.eye(4))
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()


def test_stl_is_lps_millimeters_with_outward_normals(tmp_path: Path, shape: tuple[np.ndarray, np.ndarray]) -> None:
    vertices, faces = shapes.implant_mesh(*shape)
    path = tmp_path / "implant.stl"
    write_mesh(path, SurfaceMesh(vertices, faces))
    header, normals, points = _read_stl(path)
    assert b"SPACE=LPS" in header
    assert b"UNIT=mm" in header
    assert not header.startswith(b"solid")
    np.testing.assert_allclose(points, (vertices * [-1, -1, 1])[faces], atol=1e-4)
    assert _volume(points.reshape(-1, 3), np.arange(3 * len(faces)).reshape(-1, 3)) > 0
    across = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])
    assert (np.einsum("ij,ij->i", across, normals) >= 0).all()


def test_masks_are_written_in_the_geometry_of_the_ct(tmp_path: Path, skewed: np.ndarray) -> None:
    mask = np.random.default_rng(0).random((5, 6, 7)) < 0.5
    shapes.write_mask(tmp_path / "m.nii.gz", mask, skewed)
    image = nibabel.load(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), mask)
    np.testing.assert_allclose(image.affine, skewed, atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), skewed, atol=1e-4)
    assert image.get_data_dtype() == np.uint8


def test_an_empty_implant_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="empty implant"):
        shapes.implant_field(case.head, case.defective, np.zeros_like(case.truth))
    with pytest.raises(ValueError, match="empty implant"):
        shapes.implant_mesh(np.full((4, 4, 4), -1.0, np.float32), np.eye(4))

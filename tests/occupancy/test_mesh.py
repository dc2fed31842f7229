"""Surfaces in millimeters: volume, closedness, orientation, affines, files read back, and what is refused."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.occupancy import OctreeInferer, SurfaceMesh, labels_to_mesh, logits_to_mesh, write_mesh
from tests.occupancy.shapes import box, dense, ellipsoid, painted

EXTENTS = (53, 47, 41)
AFFINES = {
    "identity": np.eye(4),
    "anisotropic": np.diag([0.7, 0.9, 2.5, 1.0]),
    "flipped": np.array([[-0.8, 0, 0, 90.0], [0, -1.1, 0, 20.0], [0, 0, 1.5, -300.0], [0, 0, 0, 1]]),
    "one axis flipped": np.array([[-0.8, 0, 0, 90.0], [0, 1.1, 0, 20.0], [0, 0, 1.5, -300.0], [0, 0, 0, 1]]),
    "oblique, axes swapped": np.array([[0, 0.9, 0.1, 5.0], [1.2, 0, 0.2, -7.0], [0, -0.1, 2, 11.0], [0, 0, 0, 1]]),
}


def is_closed(mesh: SurfaceMesh) -> bool:
    """Every edge belongs to two triangles that run through it in opposite directions."""
    edges = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    there = {tuple(edge): 0 for edge in edges.tolist()}
    return len(there) == len(edges) and all(edge[::-1] in there for edge in there)


def distance(points: Tensor) -> Tensor:
    """Logits of a ball, in voxels."""
    return 15.3 - (points - torch.tensor([26.2, 22.6, 20.4])).norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", AFFINES)
def test_a_sphere(name: str) -> None:
    """Volume within 2 %, center within a hundredth of a voxel, faces outwards under any affine."""
    affine, radius = AFFINES[name], 16.3
    mesh = labels_to_mesh(dense(ellipsoid((26, 22, 20), radius), EXTENTS), affine)
    true = 4 / 3 * math.pi * radius**3 * abs(np.linalg.det(affine[:3, :3]))
    assert mesh.volume == pytest.approx(true, rel=0.02)
    assert is_closed(mesh)
    center = affine[:3] @ [26, 22, 20, 1]
    np.testing.assert_allclose((mesh.vertices.min(0) + mesh.vertices.max(0)) / 2, center, atol=1e-2)
    middle = mesh.vertices[mesh.faces].mean(1) - center
    normal = np.cross(*(mesh.vertices[mesh.faces[:, i]] - mesh.vertices[mesh.faces[:, 0]] for i in (1, 2)))
    assert (np.einsum("ij,ij->i", middle, normal) > 0).all()


@pytest.mark.slow
def test_logits_give_sub_voxel_precision() -> None:
    volume = torch.zeros(1, 1, *EXTENTS)
    true = 4 / 3 * math.pi * 15.3**3
    logits = OctreeInferer()(volume, distance)
    precise = logits_to_mesh(logits, np.eye(4))
    assert precise.volume == pytest.approx(true, rel=0.003)
    assert is_closed(precise)
    steps = labels_to_mesh((logits > 0).byte(), np.eye(4))
    errors = [np.abs(np.linalg.norm(m.vertices - [26.2, 22.6, 20.4], axis=1) - 15.3).max() for m in (precise, steps)]
    assert errors[0] < 0.02 < 0.3 < errors[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_octrees_surface_is_the_dense_one(channels: int) -> None:
    """Stand-in logits are never at a corner of a cell that the surface passes."""

    def classes(points: Tensor) -> Tensor:
        inside = distance(points)
        return torch.cat([torch.zeros_like(inside), inside, inside + 0.6 * points[..., :1] - 20], dim=-1)

    network = classes if channels == 3 else distance
    octree = OctreeInferer()(torch.zeros(1, 1, *EXTENTS), network)
    every = OctreeInferer(stride=1)(torch.zeros(1, 1, *EXTENTS), network)
    assert not torch.equal(octree, every)
    for label in range(1, max(channels, 2)):
        ours, reference = (logits_to_mesh(logits, AFFINES["anisotropic"], label) for logits in (octree, every))
        np.testing.assert_array_equal(ours.faces, reference.faces)
        np.testing.assert_array_equal(ours.vertices, reference.vertices)


def test_the_border_closes_half_a_voxel_outside() -> None:
    affine = AFFINES["anisotropic"]
    full = torch.ones(5, 6, 7, dtype=torch.uint8)
    for mesh in (labels_to_mesh(full, affine), logits_to_mesh(full[None].float() * 3, affine)):
        np.testing.assert_allclose(mesh.vertices.min(0), -0.5 * np.diag(affine)[:3])
        np.testing.assert_allclose(mesh.vertices.max(0), (np.array([5, 6, 7]) - 0.5) * np.diag(affine)[:3])
        assert is_closed(mesh)
    part = labels_to_mesh(dense(box((0, 2, 3), (1, 5, 3)), (5, 6, 7)), np.eye(4))
    np.testing.assert_allclose(part.vertices.min(0), [-0.5, 1.5, 2.5])
    np.testing.assert_allclose(part.vertices.max(0), [1.5, 5.5, 3.5])
    assert is_closed(part)


def test_a_logit_of_zero_is_outside() -> None:
    logits = dense(ellipsoid((5, 5, 5), 3.2), (11, 11, 11)).float()[None]
    mesh = logits_to_mesh(logits, np.eye(4))
    assert np.isfinite(mesh.vertices).all()
    assert is_closed(mesh)
    assert mesh.volume > 4 / 3 * math.pi * 3.2**3


def test_every_label_has_its_own_surface() -> None:
    labels = dense(painted(ellipsoid((26, 22, 20), 16), ellipsoid((26, 22, 20), 9)), EXTENTS)
    shell, core = (labels_to_mesh(labels[None, None], np.eye(4), label) for label in (1, 2))
    assert core.volume == pytest.approx(4 / 3 * math.pi * 9**3, rel=0.02)
    assert shell.volume == pytest.approx(4 / 3 * math.pi * (16**3 - 9**3), rel=0.02)
    assert is_closed(shell)


def test_the_affine_of_a_metatensor() -> None:
    labels, affine = dense(ellipsoid((26, 22, 20), 12), EXTENTS), AFFINES["flipped"]
    image = MetaTensor(torch.zeros(1, 1, *EXTENTS), affine=torch.from_numpy(affine))
    result = OctreeInferer(labels=True)(image, lambda points: 12 - (points - 20).norm(dim=-1, keepdim=True))
    mesh = labels_to_mesh(result)
    center = affine[:3] @ [20, 20, 20, 1]
    np.testing.assert_allclose((mesh.vertices.min(0) + mesh.vertices.max(0)) / 2, center, atol=1e-2)
    np.testing.assert_array_equal(
        labels_to_mesh(MetaTensor(labels, affine=torch.from_numpy(affine))).vertices,
        labels_to_mesh(labels.numpy(), affine).vertices,
    )


# Files


def read_stl(path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Header, normals (F, 3) and corners (F, 3, 3) of a binary STL."""
    data = path.read_bytes()
    (count,) = struct.unpack("<I", data[80:84])
    assert len(data) == 84 + 50 * count
    rows = np.frombuffer(data[84:], dtype=np.uint8).reshape(count, 50)[:, :48].copy().view("<f4").reshape(count, 4, 3)
    return data[:80], rows[:, 0], rows[:, 1:]


@pytest.mark.parametrize(("space", "sign"), [("LPS", (-1, -1, 1)), ("RAS", (1, 1, 1))])
def test_files(space: str, sign: tuple[int, int, int], tmp_path: Path) -> None:
    mesh = labels_to_mesh(dense(ellipsoid((8, 7, 6), 5), (16, 15, 13)), AFFINES["oblique, axes swapped"])
    expected = mesh.vertices * sign
    write_mesh(tmp_path / "a.stl", mesh, space)
    header, normals, corners = read_stl(tmp_path / "a.stl")
    assert f"SPACE={space}".encode() in header
    assert not header.startswith(b"solid"), "readers would take it for text"
    np.testing.assert_allclose(corners, expected[mesh.faces], atol=1e-4)
    assert float(np.einsum("ij,ij->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))) > 0
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (torch.zeros(5, 5, 5), {}, "label 1 is empty"),
        (torch.ones(5, 5, 5), {"label": 3}, "label 3 is empty"),
        (torch.ones(2, 5, 5, 5), {}, r"one volume \(H, W, D\), got shape \(2, 5, 5, 5\)"),
        (torch.ones(5, 5), {}, r"one volume \(H, W, D\), got shape \(5, 5\)"),
        (torch.ones(5, 5, 5), {"affine": None}, "a plain tensor has no affine"),
        (torch.ones(5, 5, 5), {"affine": np.eye(3)}, "must be 4x4"),
        (torch.ones(5, 5, 5), {"affine": np.diag([1.0, 0, 1, 1])}, "must span space"),
    ],
)
def test_bad_labels(labels: Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        labels_to_mesh(labels, **{"affine": np.eye(4), **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("logits", "label", "message"),
    [
        (-torch.ones(1, 5, 5, 5), 1, "class 1 is empty"),
        (torch.ones(1, 5, 5, 5), 2, r"label 2 needs logits \(K, H, W, D\) that have it"),
        (torch.ones(3, 5, 5, 5), 3, "label 3 needs logits"),
        (torch.ones(2, 3, 5, 5, 5), 1, "label 1 needs logits"),
    ],
)
def test_bad_logits(logits: Tensor, label: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logits_to_mesh(logits, np.eye(4), label)


def test_bad_files(tmp_path: Path) -> None:
    mesh = labels_to_mesh(torch.ones(2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match=r"written as \.stl, got 'a\.obj'"):
        write_mesh(tmp_path / "a.obj", mesh)
    with pytest.raises(ValueError, match="'LPS' or 'RAS', got 'lps'"):
        write_mesh(tmp_path / "a.stl", mesh, "lps")
    with pytest.raises(ValueError, match="without faces"):
        write_mesh(tmp_path / "a.stl", mesh._replace(faces=mesh.faces[:0]))
    assert not list(tmp_path.iterdir())

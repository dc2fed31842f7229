"""From labels or logits to a closed surface in millimeters, written as STL."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.utils import generate_spatial_bounding_box
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_finite, computable
from monai_memeff.data.atomic import atomic_write
from monai_memeff.geometry import given_affine, ras_affine


class SurfaceMesh(NamedTuple):
    """A closed surface.

    Attributes:
        vertices: float64 (V, 3), RAS+ millimeters, whatever space the volume's affine leads to.
        faces: int64 (F, 3), indices of vertices, anticlockwise seen from outside.

    Examples:
        >>> mesh = labels_to_mesh(torch.ones(20, 20, 20), torch.eye(4))
        >>> mesh.vertices.min(axis=0).tolist(), round(mesh.volume / 20**3, 2)
        ([-0.5, -0.5, -0.5], 1.0)
    """

    vertices: np.ndarray
    faces: np.ndarray

    @property
    def volume(self) -> float:
        """Enclosed cubic millimeters; positive, as faces look outwards."""
        a, b, c = (self.vertices[self.faces[:, corner]] for corner in range(3))
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


@numbers_checked
def labels_to_mesh(
    labels: Tensor | np.ndarray, affine: Tensor | np.ndarray | None = None, label: int = 1
) -> SurfaceMesh:
    """The surface of one label (marching cubes, Lorensen and Cline 1987, in the variant of Lewiner et al. 2003).

    It runs half-way between voxel centers, and half a voxel outside the border where the label touches it.

    Args:
        labels: integers (H, W, D), or with leading axes of size 1, such as the (1, 1, H, W, D) of OctreeInferer.
        affine: (4, 4), voxel index -> RAS+ millimeters; default that of a MetaTensor, whose ``space`` is minded.
        label: which one.

    Raises:
        ValueError: no voxel has the label; the shape or the affine is none of a volume; a plain tensor has no affine.

    Examples:
        >>> cube = torch.nn.functional.pad(torch.ones(4, 4, 4), [2] * 6)
        >>> float(labels_to_mesh(cube, torch.eye(4)).vertices.max())
        5.5
    """
    matrix, volume = _affine(labels, affine), _volume(labels)
    inside = volume == label
    if not inside.any():
        raise ValueError(f"label {label} is empty: no voxel of the volume has it, so it has no surface.")
    box = _box(inside)
    return _surface(inside[box].astype(np.float32) - 0.5, box, matrix)


@numbers_checked
def logits_to_mesh(logits: Tensor, affine: Tensor | np.ndarray | None = None, label: int = 1) -> SurfaceMesh:
    """The surface of one class at sub-voxel precision, where its logit equals the largest of the others.

    OctreeInferer queries all corners of every cell that the surface passes, so this is the surface of the densely
    evaluated logits.

    Args:
        logits: (K, H, W, D) or (1, K, H, W, D), as OctreeInferer gives them; one channel is positive inside label 1.
        affine: (4, 4), voxel index -> RAS+ millimeters; default that of a MetaTensor, whose ``space`` is minded.
        label: which class.

    Raises:
        ValueError: as for :func:`labels_to_mesh`, and where there is no such class.

    Examples:
        >>> index = torch.stack(torch.meshgrid(*[torch.arange(9.0)] * 3, indexing="ij"))
        >>> logits = 3.25 - (index - 4).norm(dim=0)[None]  # a ball of radius 3.25 around voxel (4, 4, 4)
        >>> float(logits_to_mesh(logits, torch.eye(4)).vertices.max())
        7.25
    """
    matrix = _affine(logits, affine)
    stack = logits.detach().as_subclass(Tensor)
    stack = stack[0] if stack.dim() == 5 and len(stack) == 1 else stack
    if stack.dim() != 4 or not (label == 1 if len(stack) == 1 else 0 <= label < len(stack)):
        raise ValueError(f"label {label} needs logits (K, H, W, D) that have it, got shape {tuple(logits.shape)}.")
    if not stack.is_floating_point():
        raise ValueError(f"logits are floating-point numbers, got {stack.dtype}; labels_to_mesh takes label maps.")
    stack = stack.float()
    check_finite(stack, "logits_to_mesh")
    field = stack[0]
    if len(stack) > 1:
        others = torch.cat([stack[:label], stack[label + 1 :]])
        field = stack[label] - others.amax(0)
    values = field.cpu().numpy()
    if not (values > 0).any():
        raise ValueError(f"class {label} is empty: its logit is the largest nowhere, so it has no surface.")
    box = _box(values > 0)
    return _surface(values[box], box, matrix)


def write_mesh(path: str | Path, mesh: SurfaceMesh, space: str = "LPS") -> None:
    """Write a binary STL in millimeters.

    Args:
        path: Ends in .stl; its folder exists.
        mesh: Surface in RAS+ millimeters.
        space: "LPS", as DICOM and 3D Slicer take files (the header says so), or "RAS", as it is.

    Raises:
        ValueError: another suffix or space, no faces, or vertices that float32 does not hold.

    Examples:
        >>> import os, tempfile
        >>> mesh = labels_to_mesh(torch.ones(4, 4, 4), torch.eye(4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_mesh(f"{folder}/cube.stl", mesh)
        ...     os.path.getsize(f"{folder}/cube.stl") == 84 + 50 * len(mesh.faces)
        True
    """
    path = Path(path)
    if path.suffix.lower() != ".stl":
        raise ValueError(f"a mesh is written as .stl, got {path.name!r}; other formats by meshio or trimesh.")
    if space not in ("LPS", "RAS"):
        raise ValueError(f"space must be 'LPS' or 'RAS', got {space!r}.")
    if not len(mesh.faces):
        raise ValueError("a mesh without faces cannot be written.")
    if not (np.abs(mesh.vertices) <= np.finfo(np.float32).max).all():
        raise ValueError("the vertices of a mesh must be finite numbers of float32, got others; check the affine.")
    points = (mesh.vertices * ([-1.0, -1.0, 1.0] if space == "LPS" else 1.0)).astype("<f4")
    content = _stl(points, mesh.faces, space)
    with atomic_write(path) as work:
        work.write_bytes(content)


def _stl(points: np.ndarray, faces: np.ndarray, space: str) -> bytes:
    corners = points[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    record = np.zeros(len(faces), dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")])
    record["normal"], record["corners"] = normals, corners
    header = f"monai-memeff; UNIT=mm; SPACE={space}".encode().ljust(80)
    return header + struct.pack("<I", len(faces)) + record.tobytes()


def _surface(field: np.ndarray, box: tuple[slice, ...], affine: np.ndarray) -> SurfaceMesh:
    """The zero of a field that is positive inside, closed half a voxel outside its border."""
    from skimage.measure import marching_cubes

    size = np.maximum(np.abs(field), np.finfo(np.float32).tiny)
    away = np.where(field > 0, size, -size)  # a zero is outside, as for labels
    padded = np.pad(away, 1, mode="edge")
    rim = np.pad(np.zeros(field.shape, bool), 1, constant_values=True)
    padded[rim] = -np.abs(padded[rim])
    vertices, faces, _, _ = marching_cubes(padded, 0.0)
    index = vertices.astype(np.float64) + [part.start - 1 for part in box]
    mesh = SurfaceMesh(index @ affine[:3, :3].T + affine[:3, 3], faces.astype(np.int64))
    return mesh if mesh.volume > 0 else mesh._replace(faces=mesh.faces[:, ::-1].copy())


def _box(inside: np.ndarray) -> tuple[slice, ...]:
    """The smallest box with all of the mask and one voxel more on each side, within the volume."""
    return tuple(map(slice, *generate_spatial_bounding_box(inside[None], margin=1, allow_smaller=True)))


def _affine(volume: Tensor | np.ndarray, affine: Tensor | np.ndarray | None) -> np.ndarray:
    if affine is None:
        if not isinstance(volume, MetaTensor):
            raise ValueError("a plain tensor has no affine: give affine= (4, 4), voxel index -> millimeters.")
        return ras_affine(volume).cpu().numpy()
    return given_affine(volume, affine).cpu().numpy()


def _volume(labels: Tensor | np.ndarray) -> np.ndarray:
    if not isinstance(labels, Tensor):
        labels = np.asarray(labels)
        labels = torch.from_numpy(np.ascontiguousarray(labels, labels.dtype.newbyteorder("=")))
    tensor = labels.detach().as_subclass(Tensor)
    check_finite(tensor, "labels_to_mesh")
    values = (tensor.float() if tensor.dtype == torch.bfloat16 else computable(tensor)).cpu().numpy()
    if values.ndim < 3 or any(extent != 1 for extent in values.shape[:-3]):
        raise ValueError(f"labels must be one volume (H, W, D), got shape {values.shape}.")
    return values.reshape(values.shape[-3:])

"""A head CT in, a cubic skull grid out by the bundle's transforms, with the affines back to the CT's own grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.utils import get_largest_connected_component_mask
from nibabel import Nifti1Image
from nibabel.affines import apply_affine
from nibabel.processing import resample_from_to

from monai_memeff.apps.skull.demo.grid import AIR, onto_grid
from monai_memeff.apps.skull.demo.io import (
    BONE_HU,
    InputError,
    check_bone,
    check_ct,
    check_size,
    check_units,
    is_ct,
    millimeters,
    read_ct,
)
from monai_memeff.apps.skull.demo.pretrained import ModelGrid
from monai_memeff.geometry import is_anisotropic, is_oblique, ras_affine, resize_affine, spacing

MASK_HU = 1000.0
MARGIN = 0.05  # air kept on each side of the skull, as a fraction of its extent
FINEST = 256  # edge of the finest grid on which bone is thresholded before pooling
GRID_FULL = 0.35  # a skull occupies a tenth of the grid, more or less
EXTENT_MM = (60.0, 400.0)
UPPER_MM = 110.0  # below the vertex, still above the jaw and the shoulders


@dataclass(frozen=True)
class HeadVolume:
    """One head on the network's grid, and the affines back to the image it came from.

    Attributes:
        skull: bool (S, S, S), True where any bone lies in the cell; indices grow towards the
            right, the front and the top of the head (RAS+).
        affine: float64 (4, 4), index of a cell -> millimeters (RAS+).
        gray: int16 (S * k, S * k, S * k), the CT in HU on the finer grid that was thresholded; for pictures.
        gray_affine: float64 (4, 4), index of a voxel of ``gray`` -> millimeters (RAS+).
        bone: bool (H, W, D), the skull in the image's own geometry, other bone-dense objects removed.
        ct_affine: float64 (4, 4), index of a voxel of the image -> millimeters (RAS+).
        fill: volume of the bone over the volume of the cells that hold it, in (0, 1].
        threshold: Hounsfield units above which a voxel counted as bone.
        name: what to call the head in a report.
        notes: plain sentences about what was found or changed.
        model: the grid of a trained model, when the head lies on it.
    """

    skull: np.ndarray
    affine: np.ndarray
    gray: np.ndarray
    gray_affine: np.ndarray
    bone: np.ndarray
    ct_affine: np.ndarray
    fill: float
    threshold: float
    name: str
    notes: tuple[str, ...] = field(default=())
    model: ModelGrid | None = None

    @property
    def size(self) -> int:
        """Edge of the grid in cells."""
        return int(self.skull.shape[0])

    @property
    def cell_mm(self) -> float:
        """Edge of one cell in millimeters."""
        return float(self.affine[0, 0])

    @property
    def occupancy(self) -> float:
        """Fraction of cells that hold bone."""
        return float(self.skull.mean())

    def tensor(self) -> MetaTensor:
        """The skull as a float32 MetaTensor (1, S, S, S) that carries the affine of the grid."""
        return MetaTensor(torch.from_numpy(self.skull[None].astype(np.float32)), affine=torch.from_numpy(self.affine))


def skull_cube(bone: np.ndarray, affine: np.ndarray, name: str = "the image") -> tuple[np.ndarray, float]:
    """The cube in the world that holds the vault and what lies below it to the same depth.

    The cube hangs from the highest point of the bone (RAS+ z). Its edge is the larger horizontal extent of the skull,
    first within 110 mm of the vertex and then within that depth, plus 5 % of air on every side.

    Args:
        bone: bool (H, W, D), one piece.
        affine: (4, 4) index -> millimeters (RAS+).
        name: how to call the image in the message.

    Returns:
        float64 (3,) lowest corner, and the edge, in millimeters.

    Raises:
        InputError: when the extent is not that of a head (60 to 400 mm).
    """
    points = np.argwhere(bone)
    points = apply_affine(affine, points[:: max(1, len(points) // 2_000_000)])
    top = float(points[:, 2].max())
    depth = UPPER_MM
    for _ in range(2):
        upper = points[points[:, 2] > top - depth]
        low, high = upper[:, :2].min(axis=0), upper[:, :2].max(axis=0)
        depth = extent = float((high - low).max())
    if not EXTENT_MM[0] <= extent <= EXTENT_MM[1]:
        raise InputError(
            f"the largest piece of bone in {name} is {extent:.0f} mm wide, and a skull is {EXTENT_MM[0]:g} to"
            f" {EXTENT_MM[1]:g} mm: check the spacing in its header, or lower --threshold"
        )
    edge = extent * (1 + 2 * MARGIN)
    corner = np.array([*((low + high) / 2 - edge / 2), top + MARGIN * extent - edge])
    return corner, edge


def resample_to_grid(
    image: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    shape: tuple[int, ...],
    order: int = 1,
    outside: float = 0.0,
) -> np.ndarray:
    """Sample a volume on another grid, through the two affines; oblique and anisotropic ones included.

    Args:
        image: (H, W, D).
        source: (4, 4) affine of ``image``.
        target: (4, 4) affine of the wanted grid.
        shape: shape of the wanted grid.
        order: order of the spline; 0 is nearest, 1 linear.
        outside: value beyond the image.

    Returns:
        float32 of ``shape``.
    """
    moving = Nifti1Image(np.asarray(image, dtype=np.float32), source)
    return np.asarray(resample_from_to(moving, (shape, target), order=order, cval=outside).dataobj)


def prepare_head(
    image: MetaTensor,
    size: int = 64,
    threshold: float | None = None,
    name: str = "head",
    model: ModelGrid | None = None,
) -> HeadVolume:
    """Bring a head CT onto the network's cubic grid.

    Bone is thresholded and its largest piece kept. The transforms of the bundle ``skull_completion_sparse``
    (:func:`onto_grid`) threshold it on a grid at least about as fine as the CT's own and pool it, so that a cell is
    occupied where any bone is; the cells are as large as the skull's cube (:func:`skull_cube`) needs.

    Args:
        image: (1, H, W, D) in Hounsfield units, affine in RAS+ or LPS millimeters, any orientation and spacing.
        size: edge of the grid in cells.
        threshold: value above which a voxel counts as bone; None: 300 Hounsfield units, and an image in other units
            is refused.
        name: what to call the head.
        model: the grid of a trained model, whose cells are then used; None: cells that fit the head.

    Returns:
        The head on the grid.

    Raises:
        InputError: on every input that :func:`check_size`, :func:`check_ct`, :func:`check_bone`, :func:`check_units` or
            :func:`skull_cube` refuse, and when more than a third of the pooled grid is bone.
    """
    check_size(size)
    check_ct(image, name)
    values = np.array(image[0].as_tensor().cpu().numpy(), dtype=np.float32)
    values, threshold, remarks = _in_units(values, threshold, name)
    ct_affine = ras_affine(image).cpu().numpy()
    dense = check_bone(values, threshold, name)
    bone = get_largest_connected_component_mask(dense)
    corner, edge = skull_cube(bone, ct_affine, name)
    headroom = edge * MARGIN / (1 + 2 * MARGIN)
    pool = _pool(edge / size, ct_affine, size)
    if model is not None and edge > size * model.cell_mm:
        remarks = (*remarks, f"the head is larger than the shipped model's grid of {size * model.cell_mm:g} mm")
        model = None
    if model is not None:
        top = corner[2] + edge - headroom
        edge, headroom, pool = size * model.cell_mm, model.headroom_mm, model.pool
        corner = np.array([*corner[:2], top + headroom - edge])
    notes = (*image.meta.get("notes", ()), *remarks, *_notes(bone, dense, ct_affine))
    values[dense & ~bone] = min(threshold, 0.0)
    grid = onto_grid(
        MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(ct_affine)), float(corner[2]), grid=size,
        cell_mm=edge / size, pool=pool, headroom_mm=headroom, bone_threshold=threshold,
    )  # fmt: skip
    skull, affine = grid[0].as_tensor().numpy() > 0, np.asarray(grid.affine, dtype=np.float64)
    fine_affine = resize_affine(affine, grid.shape[1:], (size * pool,) * 3).numpy()
    gray = resample_to_grid(values, ct_affine, fine_affine, (size * pool,) * 3, outside=AIR)
    if not skull.any() or skull.mean() >= GRID_FULL:
        raise InputError(
            f"bone fills {skull.mean():.0%} of the grid of {size}^3 cells in {name}, and more than 0 % and less than"
            f" {GRID_FULL:.0%} is needed: change --threshold (now {threshold:g} HU)"
        )
    return HeadVolume(
        skull=skull, affine=affine, gray=np.clip(gray, AIR, 3071).astype(np.int16), gray_affine=fine_affine,
        bone=bone, ct_affine=ct_affine, model=model, fill=min(float((gray > threshold).mean() / skull.mean()), 1.0),
        threshold=threshold, name=name, notes=notes,
    )  # fmt: skip


def _pool(cell: float, affine: np.ndarray, size: int) -> int:
    """Voxels of the finer grid along an edge of a cell: about the image's own, at least two, within reason."""
    return min(max(round(cell / min(spacing(affine))), 2), max(1, FINEST // size))


def _in_units(values: np.ndarray, given: float | None, name: str) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Values and the threshold of bone in the same units, and what is to be said of them."""
    threshold = BONE_HU if given is None else given
    if _is_mask(values, threshold):
        said = f"the image is a mask: bone counts as {MASK_HU:g} HU, the rest as 0"
        return (values > threshold).astype(np.float32) * MASK_HU, MASK_HU / 2, (said,)
    image = torch.from_numpy(values)
    if given is None:
        check_bone(values, threshold, name)
        check_units(image, name)
    said = "hardly any voxel is air of a CT: the image may not be in Hounsfield units, but --threshold was given"
    return values, threshold, () if is_ct(image) else (said,)


def _is_mask(values: np.ndarray, threshold: float) -> bool:
    """Whether there are two values only, with the threshold between them."""
    low, high = float(values.min()), float(values.max())
    return 0 <= low <= threshold < high <= 255 and bool(((values == low) | (values == high)).all())


def _notes(bone: np.ndarray, dense: np.ndarray, affine: np.ndarray) -> tuple[str, ...]:
    notes = []
    if is_anisotropic(affine, 0.05):
        notes.append(f"anisotropic voxels ({millimeters(np.array(spacing(affine)))}) were resampled to cubes")
    if is_oblique(affine):
        notes.append("oblique axes were resampled to the axes of the body")
    upwards = affine[2, :3] / spacing(affine)
    axis = int(np.abs(upwards).argmax())
    end = bone.shape[axis] - 1 if upwards[axis] > 0 else 0
    if bone.take(end, axis=axis).any():
        notes.append("the skull touches the upper end of the image: its vault may be cut off")
    removed = int(dense.sum()) - int(bone.sum())
    if removed:
        notes.append(f"{removed} dense voxels apart from the skull were left out")
    return tuple(notes)


def load_head(
    path: str | Path | None = None,
    size: int = 64,
    threshold: float | None = None,
    seed: int = 0,
    series: str | None = None,
    resample: bool = False,
    model: ModelGrid | None = None,
) -> HeadVolume:
    """Read a head CT, or generate one, and bring it onto the network's grid.

    Args:
        path: see :func:`read_ct`; None generates a head (:func:`monai_memeff.apps.skull.phantom.head_phantom`).
        size: edge of the grid in cells.
        threshold: see :func:`prepare_head`.
        seed: seed of the generated head.
        series: see :func:`read_ct`.
        resample: see :func:`read_ct`.
        model: see :func:`prepare_head`.

    Returns:
        The head on the grid.

    Raises:
        InputError: on every bad input, in one line.
    """
    check_size(size)
    if path is not None:
        return prepare_head(read_ct(path, series, resample), size, threshold, Path(path).name, model)
    if series is not None or resample:
        raise InputError("a generated head is no DICOM series: give --image, or leave out --series and --resample")
    from monai_memeff.apps.skull.phantom import head_phantom

    head = head_phantom(seed=seed)
    image = MetaTensor(head.image[None], affine=head.affine)
    return prepare_head(image, size, threshold, f"generated head (seed {seed})", model)

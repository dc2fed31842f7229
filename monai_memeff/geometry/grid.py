"""One convention for positions: voxel index <-> unit cube at cell centers <-> millimeters through a 4x4 affine.

Index: voxel ``i`` of an axis with ``n`` voxels has its center at ``i`` and covers ``[i - 1/2, i + 1/2)``; the axes are
(i, j, k), as in the image array (H, W, D). Unit cube: the whole volume, outer faces included, is ``[-1, 1]`` along
every axis, so that center is ``(2 i + 1) / n - 1``; this is torch's ``align_corners=False``. Millimeters: ``affine @
(i, j, k, 1)`` with the image's own 4x4 affine (MONAI: RAS). Points are tensors (..., 3), components in the last axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def index_to_unit(index: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    """Map voxel indices to the unit cube.

    Args:
        index: (..., d) positions in voxels, whole or fractional.
        spatial_shape: the d extents in voxels.

    Returns:
        (..., d) positions in [-1, 1] for points inside the volume; floating point.

    Raises:
        ValueError: the components are not as many as the extents, or an extent is less than 1.

    Examples:
        >>> index_to_unit(torch.tensor([0, 1]), (2, 4))
        tensor([-0.5000, -0.2500])
    """
    extent = _extent(index, spatial_shape)
    return (2 * index + 1) / extent - 1


def sample_at(image: Tensor, unit: Tensor, mode: str = "bilinear", padding_mode: str = "border") -> Tensor:
    """Read a volume at points of the unit cube.

    ``torch.nn.functional.grid_sample`` wants the components of a point in the order (k, j, i); the turn is made here,
    so that nobody else has to remember it.

    Args:
        image: (B, C, H, W, D).
        unit: (B, N, 3) positions in the order (i, j, k), in the unit cube.
        mode: ``"bilinear"`` (trilinear in a volume) or ``"nearest"``.
        padding_mode: what lies outside: ``"border"``, ``"zeros"`` or ``"reflection"``.

    Returns:
        (B, C, N) values.

    Examples:
        >>> volume = torch.arange(8.0).view(1, 1, 2, 2, 2)
        >>> sample_at(volume, torch.tensor([[[0.5, -0.5, -0.5]]]))  # the center of voxel (1, 0, 0)
        tensor([[[4.]]])
    """
    grid = unit.flip(-1)[:, :, None, None, :]
    return F.grid_sample(image, grid, mode=mode, padding_mode=padding_mode, align_corners=False)[..., 0, 0]


def index_to_mm(index: Tensor, affine: Tensor) -> Tensor:
    """Map (..., 3) voxel indices to millimeters with a (4, 4) affine; float64. Errors: see :func:`check_affine`.

    Examples:
        >>> index_to_mm(torch.tensor([1, 2, 3]), torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0])))
        tensor([ 2.,  4., 15.], dtype=torch.float64)
    """
    matrix = check_affine(affine).to(index.device)
    return index.to(torch.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def mm_to_index(points: Tensor, affine: Tensor) -> Tensor:
    """Map (..., 3) millimeters to fractional indices with a (4, 4) affine; float64. Errors: see :func:`check_affine`.

    Examples:
        >>> mm_to_index(torch.tensor([2.0, 4.0, 16.0]), torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0])))
        tensor([1.0000, 2.0000, 3.2000], dtype=torch.float64)
    """
    matrix = check_affine(affine).to(points.device)
    offset = points.to(torch.float64) - matrix[:3, 3]
    return offset @ torch.linalg.inv(matrix[:3, :3]).T


def check_affine(affine: Tensor | np.ndarray) -> Tensor:
    """Refuse anything but an affine of a volume.

    Args:
        affine: (4, 4), voxel index to millimeters.

    Returns:
        The affine as a float64 tensor on its own device.

    Raises:
        ValueError: wrong shape, values that are not finite, or axes that do not span space.

    Examples:
        >>> check_affine(torch.zeros(3, 3))
        Traceback (most recent call last):
        ValueError: An affine must be 4x4, got shape (3, 3); 2D images need a third axis.
    """
    try:
        matrix = torch.as_tensor(affine).detach().as_subclass(Tensor).to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"An affine must be a 4x4 array of numbers, got {type(affine).__name__}.") from None
    if matrix.shape != (4, 4):
        raise ValueError(f"An affine must be 4x4, got shape {tuple(matrix.shape)}; 2D images need a third axis.")
    if not bool(matrix.isfinite().all()):
        raise ValueError("An affine must be finite, got NaN or infinity; repair the image header.")
    lengths = matrix[:3, :3].norm(dim=0)
    if float(torch.linalg.det(matrix[:3, :3]).abs()) <= 1e-6 * float(lengths.prod()):
        raise ValueError(
            f"The three columns of an affine must span space, got lengths {_short(lengths)} mm with determinant ~ 0; "
            "repair the image header."
        )
    return matrix


def spacing(affine: Tensor | np.ndarray) -> tuple[float, float, float]:
    """Voxel size in millimeters along (i, j, k): the lengths of the columns of a (4, 4) affine.

    Examples:
        >>> spacing(torch.diag(torch.tensor([-2.0, 2.0, 5.0, 1.0])))
        (2.0, 2.0, 5.0)
    """
    lengths = check_affine(affine)[:3, :3].norm(dim=0).tolist()
    return lengths[0], lengths[1], lengths[2]


def voxel_volume(affine: Tensor | np.ndarray) -> float:
    """Volume of one voxel in cubic millimeters by a (4, 4) affine; right for sheared axes too.

    Examples:
        >>> voxel_volume(torch.diag(torch.tensor([-2.0, 2.0, 5.0, 1.0])))
        20.0
    """
    return float(torch.linalg.det(check_affine(affine)[:3, :3]).abs())


def is_anisotropic(affine: Tensor | np.ndarray, tolerance: float = 1e-2) -> bool:
    """Whether voxels differ from cubes: the longest edge exceeds the shortest by more than the fraction ``tolerance``.

    Examples:
        >>> is_anisotropic(torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0])))
        True
    """
    edges = spacing(affine)
    return max(edges) > (1 + tolerance) * min(edges)


def is_oblique(affine: Tensor | np.ndarray, tolerance: float = 1e-3) -> bool:
    """Whether some voxel axis is parallel to no world axis, by tilt or shear; flips and swaps of axes are not oblique.

    Args:
        affine: (4, 4), voxel index to millimeters.
        tolerance: largest component across, as a fraction of the axis' length; 1e-3 is 0.06 degrees.

    Examples:
        >>> is_oblique(torch.diag(torch.tensor([-2.0, 2.0, 5.0, 1.0])))
        False
    """
    matrix = check_affine(affine)[:3, :3]
    directions = (matrix / matrix.norm(dim=0)).abs()
    across = directions.sort(dim=0).values[1]
    return bool((across > tolerance).any())


def crop_affine(affine: Tensor | np.ndarray, start: Sequence[int]) -> Tensor:
    """Affine of the part of a volume that begins at voxel ``start`` (i, j, k): every voxel keeps its millimeters.

    (4, 4) to (4, 4) float64.

    Examples:
        >>> crop_affine(torch.eye(4), (10, 0, 5))[:3, 3]
        tensor([10.,  0.,  5.], dtype=torch.float64)
    """
    matrix = check_affine(affine).clone()
    offset = torch.tensor(tuple(start), dtype=torch.float64, device=matrix.device)
    matrix[:3, 3] += matrix[:3, :3] @ offset
    return matrix


def resize_affine(affine: Tensor | np.ndarray, spatial_shape: Sequence[int], new_shape: Sequence[int]) -> Tensor:
    """Affine of a volume resampled to ``new_shape`` voxels over the same space.

    The outer faces stay where they are (cell centers move), as ``interpolate(..., align_corners=False)`` resamples.

    Args:
        affine: (4, 4) of the volume with ``spatial_shape``.
        spatial_shape: extents (i, j, k) before.
        new_shape: extents (i, j, k) after.

    Returns:
        (4, 4) float64 affine of the resampled volume.

    Examples:
        >>> resize_affine(torch.eye(4), (8, 8, 8), (4, 4, 4))[0]
        tensor([2.0000, 0.0000, 0.0000, 0.5000], dtype=torch.float64)
    """
    matrix = check_affine(affine).clone()
    ratios = [old / new for old, new in zip(spatial_shape, new_shape, strict=True)]
    factor = torch.tensor(ratios, dtype=torch.float64, device=matrix.device)
    matrix[:3, 3] += matrix[:3, :3] @ ((factor - 1) / 2)
    matrix[:3, :3] *= factor
    return matrix


def _extent(points: Tensor, spatial_shape: Sequence[int]) -> Tensor:
    if points.ndim == 0 or points.shape[-1] != len(spatial_shape) or min(spatial_shape) < 1:
        raise ValueError(
            f"Points must hold one component per axis of a volume without empty axes, got points of shape "
            f"{tuple(points.shape)} for a volume of {tuple(spatial_shape)} voxels."
        )
    dtype = points.dtype if points.is_floating_point() else torch.get_default_dtype()
    return torch.tensor(tuple(spatial_shape), dtype=dtype, device=points.device)


def _short(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values.tolist()) + ")"

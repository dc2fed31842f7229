"""Between volumes, points and sparse tensors: masks to points in millimeters and back, points to tensors and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import as_network_input, check_finite, check_mask, plain
from monai_memeff.errors import InputError
from monai_memeff.geometry import grid, ras_affine, space_of, to_ras, voxels
from monai_memeff.sparse.core.tensor import SparseTensor
from monai_memeff.sparse.points.data import Data, attributes, batch_of, check_points, with_attributes
from monai_memeff.sparse.points.grid_sampling import most_frequent
from monai_memeff.sparse.points.placed import place, placed_coordinates, rows_at


def points_from_mask(mask: Tensor, image: Tensor | None = None, labels: Tensor | None = None) -> Data:
    """The voxels of a mask as points in millimeters.

    Args:
        mask: (1, H, W, D), a voxel is taken where it is not zero; the affine of a MetaTensor says where its center is,
            without one a voxel is a millimeter.
        image: (C, H, W, D) on the same grid: its values become the features ``x``; without one ``x`` is a column of
            ones.
        labels: (1, H, W, D) on the same grid: its values become ``y``.

    Returns:
        Points with ``pos`` (N, 3) float32 in RAS millimeters, also of a volume in LPS, in lexicographic order of the
        voxels, ``x`` (N, C) float32, and ``y`` (N,) int64 where labels are given.

    Raises:
        ValueError: the mask is not (1, H, W, D), or the others are not on its grid; the mask holds NaN, infinity or
            negative numbers; within it, the image holds NaN, infinity or integers that float32 lacks (beyond 2^24), or
            the labels fractions.

    Examples:
        >>> points_from_mask(torch.eye(4)[None, None])
        Data(pos=[4, 3], x=[4, 1])
    """
    shape = _spatial_shape("mask", mask)
    for name, other in (("image", image), ("labels", labels)):
        if other is not None and (other.ndim != 4 or tuple(other.shape[1:]) != shape):
            raise ValueError(f"{name} must be (C, H, W, D) on the mask's grid {shape}, got {tuple(other.shape)}.")
    check_mask(mask, "points_from_mask")
    active = plain(mask)[0] != 0
    pos = grid.index_to_mm(active.nonzero(), _affine(mask)).float()
    x = pos.new_ones(len(pos), 1) if image is None else _features(plain(image)[:, active].t())
    return Data(pos, x, None if labels is None else _whole(plain(labels)[0][active]))


def mask_from_points(
    data: Any, reference: Tensor, values: str | None = "y", within: Tensor | None = None
) -> MetaTensor:
    """Points in millimeters as a volume on the grid of a reference.

    A voxel that holds points gets their most frequent value (of equals the smallest). Where the points are sparser
    than the voxels, ``within`` names the voxels to fill: each gets the value of the point nearest to its center.

    Args:
        data: points with ``pos`` (N, 3) in RAS millimeters, one cloud.
        reference: (C, H, W, D), whose grid and affine the result has.
        values: the attribute to write, (N,) integers or booleans; None marks the voxels with 1.
        within: (1, H, W, D): write these voxels and no others, by the nearest point.

    Returns:
        (1, H, W, D) with the reference's metadata; int64, uint8 for ``values=None``; 0 where nothing is written.

    Raises:
        ValueError: the points hold several clouds or lack the attribute, a point lies outside the grid, or there are
            voxels to fill and no point.

    Examples:
        >>> mask = torch.eye(4)[None, None]
        >>> bool((mask_from_points(points_from_mask(mask), reference=mask, values=None) == mask).all())
        True
    """
    check_points(data)
    shape, affine = _spatial_shape("reference", reference, channels=None), _affine(reference)
    written = _values_of(data, values)
    pos = data.pos.detach()
    if within is not None:
        if tuple(within.shape) != (1, *shape):
            raise ValueError(f"within must be (1, H, W, D) on the grid {shape}, got {tuple(within.shape)}.")
        check_mask(within, "mask_from_points")
        volume = _by_nearest(pos, written, plain(within)[0] != 0, affine)
    else:
        volume = _by_voxel(pos, written, shape, affine)
    own = to_ras(affine, space_of(reference))  # in the reference's own space again
    return MetaTensor(volume[None], meta={**getattr(reference, "meta", {}), "affine": own})


def to_sparse_tensor(data: Any) -> SparseTensor:
    """Points on a grid as a SparseTensor: ``x`` on the voxels ``coords``, a column of ones where there is no ``x``.

    Args:
        data: Points as :class:`GridSampling3D` leaves them with ``quantize_coords=True``.

    Returns:
        A tensor on a grid that may begin below zero: see :func:`placed_coordinates`.

    Raises:
        ValueError: there are no ``coords``, or two points share a voxel.

    Examples:
        >>> points = GridSampling3D(2.0, quantize_coords=True)(Data(torch.tensor([[0.0, 0.0, 1.0], [5.0, 5.0, 5.0]])))
        >>> to_sparse_tensor(points).features.shape
        torch.Size([2, 1])
    """
    found = attributes(data)
    if "coords" not in found:
        raise ValueError(
            "the points have no coords, the voxels they stand on; use GridSampling3D(size, quantize_coords=True) first."
        )
    features = found.get("x")
    if features is None:
        features = data.pos.new_ones(len(data.pos), 1)
    features = features if features.ndim == 2 else features[:, None]
    return place(features, data.coords, batch_of(data))


@numbers_checked
def data_from_sparse(x: SparseTensor, like: Any = None, grid_size: float | None = None) -> Any:
    """A SparseTensor as points.

    Args:
        x: Tensor from :func:`to_sparse_tensor` or ``points.nn.SparseTensor``, or from layers on such a tensor.
        like: points with ``coords``: a shallow copy of them comes back, with the features in their order as ``x``; at
            a coarser level every point gets the features of its cell.
        grid_size: without ``like``, the edge of a voxel of the finest level.

    Returns:
        ``like`` with other features; or :class:`Data` with one point per voxel at the center of its cell, ``x``,
        ``batch``, ``coords`` (the finest level's) and ``grid_size`` (of this level).

    Raises:
        ValueError: neither or both of ``like`` and ``grid_size`` are given, a point of ``like`` has no voxel, or ``x``
            was not made from points.

    Examples:
        >>> x = nn.SparseTensor(torch.ones(2, 8), torch.tensor([[-1, 0, 0], [3, 4, 5]]))
        >>> data_from_sparse(x, grid_size=2.0).pos
        tensor([[-2.,  0.,  0.],
                [ 6.,  8., 10.]])
    """
    if (like is None) == (grid_size is None):
        raise ValueError("data_from_sparse needs like=points or grid_size=..., one of the two.")
    if like is not None:
        rows = rows_at(x, like.coords, batch_of(like))
        missing = int((rows == len(x)).sum())
        if missing:
            raise ValueError(
                f"{missing} of {len(rows)} points stand on no voxel of the tensor; give the points it was made from."
            )
        return with_attributes(like, {"x": x.features[rows]})
    assert grid_size is not None
    batch, *_ = (where := placed_coordinates(x)).unbind(1)
    stride = torch.tensor(x.stride, device=x.device)
    center = where[:, 1:].double() + (stride - 1) / 2
    points = Data((center * grid_size).to(x.dtype), x.features, batch=batch)
    size = x.features.new_tensor([grid_size * max(x.stride)])
    return with_attributes(points, {"coords": where[:, 1:].to(torch.int32), "grid_size": size})


def _by_voxel(pos: Tensor, written: Tensor, shape: tuple[int, int, int], affine: Tensor) -> Tensor:
    index = grid.mm_to_index(pos, affine).round().to(torch.int64)
    limits = torch.tensor(shape, device=index.device)
    outside = int(((index < 0) | (index >= limits)).any(dim=1).sum())
    if outside:
        raise ValueError(
            f"{outside} of {len(pos)} points lie outside the reference's grid of {shape}; remove them, or give the "
            "volume they came from (align_origin and center move points away)."
        )
    keys = voxels.coordinates_to_keys(torch.nn.functional.pad(index, (1, 0)), shape)
    held, cell = torch.unique(keys, return_inverse=True)
    volume = written.new_zeros(shape[0] * shape[1] * shape[2])
    volume[held] = most_frequent(written, cell, len(held))
    return volume.view(shape)


def _by_nearest(pos: Tensor, written: Tensor, within: Tensor, affine: Tensor) -> Tensor:
    from scipy.spatial import cKDTree

    volume = written.new_zeros(within.shape)
    centers = grid.index_to_mm(within.nonzero(), affine)
    if len(centers) == 0:
        return volume
    if len(pos) == 0:
        raise ValueError("there is no point, and voxels to fill from the nearest one; give points or no voxels.")
    _, rows = cKDTree(pos.double().cpu().numpy()).query(centers.cpu().numpy())
    volume[within.to(volume.device)] = written[torch.from_numpy(np.asarray(rows)).to(written.device)]
    return volume


def _values_of(data: Any, name: str | None) -> Tensor:
    if int(batch_of(data).unique().numel()) > 1:
        raise ValueError("the points hold several clouds (batch), and a volume holds one; give them one by one.")
    if name is None:
        return torch.ones(len(data.pos), dtype=torch.uint8, device=data.pos.device)
    values = attributes(data).get(name)
    if not isinstance(values, Tensor) or values.numel() != len(data.pos) or values.is_floating_point():
        raise ValueError(
            f"the points need an attribute {name!r} with one integer each; set it (for logits, the argmax), or "
            "values=None for a mask."
        )
    return values.reshape(-1).to(torch.int64)


def _features(values: Tensor) -> Tensor:
    """Values as float32: real ones are rounded, every integer must have its own."""
    check_finite(values, "points_from_mask")
    exact = values if values.is_floating_point() else as_network_input(values, torch.float32, "points_from_mask")
    return exact.float().contiguous()


def _whole(labels: Tensor) -> Tensor:
    """Labels as int64; fractions, NaN and infinity are none."""
    if labels.is_floating_point() and not bool((labels == labels.round()).all() & labels.isfinite().all()):
        raise InputError("labels must be whole numbers, got fractions, NaN or infinity; take argmax or a threshold.")
    return labels.to(torch.int64)


def _spatial_shape(name: str, volume: Tensor, channels: int | None = 1) -> tuple[int, int, int]:
    if volume.ndim != 4 or (channels is not None and volume.shape[0] != channels):
        first = "C" if channels is None else channels
        raise ValueError(f"{name} must be ({first}, H, W, D), got {tuple(volume.shape)}; add or take a channel.")
    _, height, width, depth = volume.shape
    return height, width, depth


def _affine(volume: Tensor) -> Tensor:
    return ras_affine(volume) if isinstance(volume, MetaTensor) else torch.eye(4, dtype=torch.float64)

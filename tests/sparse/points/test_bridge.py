"""Masks to points and back on odd affines and a real CT; points to sparse tensors and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.geometry import grid
from monai_memeff.sparse.points import (
    Data,
    FixedPoints,
    GridSampling3D,
    data_from_sparse,
    mask_from_points,
    nn,
    points_from_mask,
    to_sparse_tensor,
)
from tests.sparse.points.clouds import cloud, majority

SHAPE = (5, 7, 6)
OBLIQUE = torch.tensor(
    [[-0.8, 0.3, 0.0, 40.0], [0.3, 1.1, 0.2, -70.0], [0.0, -0.1, 2.5, 9.0], [0, 0, 0, 1]], dtype=torch.float64
)


def volumes(seed: int = 0) -> tuple[MetaTensor, MetaTensor, MetaTensor]:
    """Mask, image of two channels and labels, (5, 7, 6), on an oblique grid with a flip."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, *SHAPE, generator=generator) < 0.3).float()
    image = torch.randn(2, *SHAPE, generator=generator)
    labels = torch.randint(1, 4, (1, *SHAPE), generator=generator) * mask
    return tuple(MetaTensor(v, affine=OBLIQUE) for v in (mask, image, labels))  # type: ignore[return-value]


# Masks


def test_voxels_become_points_in_millimeters() -> None:
    mask, image, labels = volumes()
    data = points_from_mask(mask, image, labels)
    assert not isinstance(data.pos, MetaTensor)
    for row, (i, j, k) in enumerate(np.argwhere(mask[0].numpy()).tolist()):
        expected = OBLIQUE.numpy() @ np.array([i, j, k, 1.0])
        np.testing.assert_allclose(data.pos[row].numpy(), expected[:3], atol=1e-5)
        assert data.x[row].tolist() == image[:, i, j, k].tolist()
        assert int(data.y[row]) == int(labels[0, i, j, k])
    assert len(data.pos) == int(mask.sum())
    bare = points_from_mask(mask)
    assert bare.x.tolist() == [[1.0]] * len(bare.pos)
    assert bare.y is None
    plain = points_from_mask(torch.ones(1, 2, 1, 1))
    assert plain.pos.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_there_and_back_is_the_same() -> None:
    mask, image, labels = volumes()
    data = FixedPoints(10**6, replace=False)(points_from_mask(mask, image, labels))  # in another order
    back = mask_from_points(data, image)
    assert torch.equal(back.as_tensor(), labels.as_tensor().long())
    assert torch.equal(back.affine, OBLIQUE)
    assert torch.equal(mask_from_points(data, labels, values=None).as_tensor(), mask.as_tensor().byte())


def test_empty_and_full() -> None:
    for value, count in ((0.0, 0), (1.0, 210)):
        mask = MetaTensor(torch.full((1, *SHAPE), value), affine=OBLIQUE)
        data = points_from_mask(mask, labels=mask)
        assert len(data.pos) == count
        assert torch.equal(mask_from_points(data, mask).as_tensor(), mask.as_tensor().long())


def test_several_points_in_a_voxel_vote() -> None:
    reference = MetaTensor(torch.zeros(1, *SHAPE), affine=OBLIQUE)
    index = torch.randint(0, 3, (80, 3))
    jitter = (torch.rand(80, 3) - 0.5) * 0.9
    data = Data(grid.index_to_mm(index + jitter, OBLIQUE), y=torch.randint(0, 3, (80,)))
    result = mask_from_points(data, reference)[0]
    for i, j, k in np.ndindex(3, 3, 3):
        held = (index == torch.tensor([i, j, k])).all(1)
        assert int(result[i, j, k]) == (majority(data.y[held]) if bool(held.any()) else 0)


def test_fewer_points_than_voxels_fill_by_the_nearest() -> None:
    mask, _, labels = volumes()
    data = FixedPoints(9, replace=False).set_random_state(0)(points_from_mask(mask, labels=labels))
    result = mask_from_points(data, mask, within=mask)[0]
    where = torch.nonzero(mask[0].as_tensor())
    nearest = torch.cdist(grid.index_to_mm(where, OBLIQUE), data.pos.double()).argmin(1)
    expected = torch.zeros(SHAPE).long()
    expected[where.unbind(1)] = data.y[nearest]
    assert torch.equal(result.as_tensor(), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: points_from_mask(m[0]), r"mask must be \(1, H, W, D\), got \(5, 7, 6\)"),
        (lambda m, d: points_from_mask(m.float() - 0.5), "needs masks, which are zero where nothing is"),
        (lambda m, d: points_from_mask(m.float() / 0), "needs finite values"),
        (lambda m, d: points_from_mask(m, image=m / 0.0), "needs finite values"),
        (lambda m, d: points_from_mask(m, image=m.long() * (2**24 + 1)), "integers up to 16777216 exactly"),
        (lambda m, d: points_from_mask(m, labels=m / 2), "labels must be whole numbers, got fractions"),
        (lambda m, d: mask_from_points(d, m, within=m.float() - 0.5), "needs masks, which are zero where nothing is"),
        (lambda m, d: points_from_mask(m, image=m[..., :3]), r"image must be .* on the mask's grid \(5, 7, 6\), got"),
        (lambda m, d: mask_from_points(Data(d.pos + 500, y=d.y), m), "of .* points lie outside the reference's grid"),
        (lambda m, d: mask_from_points(Data(d.pos), m), "need an attribute 'y' with one integer each"),
        (lambda m, d: mask_from_points(d, m, values="x"), "need an attribute 'x' with one integer each"),
        (lambda m, d: mask_from_points(d, m, within=m[..., :2]), r"within must be \(1, H, W, D\) on the grid"),
        (lambda m, d: mask_from_points(Data(d.pos, batch=torch.arange(len(d.pos))), m), "several clouds"),
        (lambda m, d: mask_from_points(Data(d.pos[:0]), m, values=None, within=m), "no point, and voxels to fill"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    mask, _, labels = volumes()
    with pytest.raises(ValueError, match=message):
        call(mask, points_from_mask(mask, labels=labels))


# Sparse tensors


@pytest.mark.parametrize("clouds", [1, 3])
def test_points_to_a_tensor_and_back(clouds: int) -> None:
    data = GridSampling3D(2.0, quantize_coords=True)(cloud(clouds=clouds))
    data = FixedPoints(10**6, replace=False)(data)  # rows of the tensor are in another order than the points
    x = to_sparse_tensor(data)
    assert not torch.equal(x.features, data.x)
    back = data_from_sparse(x.replace(x.features * 2), like=data)
    assert torch.equal(back.x, data.x * 2)
    assert torch.equal(back.y, data.y)
    assert torch.equal(data_from_sparse(x, like=data).x, data.x)
    fresh = data_from_sparse(x, grid_size=2.0)
    assert torch.equal(fresh.pos, fresh.coords * 2.0)
    order = {(int(b), *c): f for b, c, f in zip(fresh.batch, fresh.coords.tolist(), fresh.x.tolist(), strict=True)}
    batch = torch.zeros(len(data.pos)) if data.batch is None else data.batch
    for b, c, f in zip(batch, data.coords.tolist(), data.x.tolist(), strict=True):
        assert order[(int(b), *c)] == f


def test_a_coarser_level() -> None:
    """Points take the features of their cell; new points stand at the centers of the cells."""
    data = GridSampling3D(2.0, quantize_coords=True)(cloud())
    coarse = nn.Conv3d(2, 3, 2, stride=4).double()(to_sparse_tensor(data))
    fresh = data_from_sparse(coarse, grid_size=2.0)
    assert fresh.grid_size.tolist() == [8.0]
    torch.testing.assert_close(fresh.pos, (fresh.coords + 1.5).double() * 2.0)
    cells = {tuple(c): f for c, f in zip(fresh.coords.tolist(), fresh.x.tolist(), strict=True)}
    for c, f in zip(data.coords.tolist(), data_from_sparse(coarse, like=data).x.tolist(), strict=True):
        assert cells[tuple(v // 4 * 4 for v in c)] == f


def test_features_where_there_are_none_or_one() -> None:
    data = GridSampling3D(2.0, quantize_coords=True)(cloud())
    data.x = None
    assert to_sparse_tensor(data).features.tolist() == [[1.0]] * len(data.pos)
    data.x = data.heat
    assert to_sparse_tensor(data).features.shape == (len(data.pos), 1)


def test_tensors_that_do_not_fit_are_refused() -> None:
    data = GridSampling3D(2.0, quantize_coords=True)(cloud())
    x = to_sparse_tensor(data)
    with pytest.raises(ValueError, match=r"no coords.*GridSampling3D\(size, quantize_coords=True\) first"):
        to_sparse_tensor(cloud())
    for arguments in ({}, {"like": data, "grid_size": 2.0}):
        with pytest.raises(ValueError, match="one of the two"):
            data_from_sparse(x, **arguments)
    with pytest.raises(ValueError, match=r"2 of .* points stand on no voxel"):
        data_from_sparse(x.prune(torch.arange(len(x)) > 1), like=data)
    far = data.clone()
    far.coords = far.coords + 10**6
    with pytest.raises(ValueError, match="points stand on no voxel"):
        data_from_sparse(x, like=far)


# A real CT


def test_a_real_skull_there_and_back(data_dir: Path) -> None:
    """In at 300 HU, down to cells of 4 mm, through a layer, and back onto every voxel of the skull."""
    from monai.transforms import LoadImage

    image = LoadImage(ensure_channel_first=True)(data_dir / "head_ct" / "vtk_headsq_quarter.nii.gz")
    skull = image.as_subclass(torch.Tensor).gt(300)
    mask = MetaTensor(skull.float(), affine=image.affine)
    side = torch.zeros_like(mask)
    side[:, : mask.shape[1] // 2] = 1
    points = points_from_mask(mask, image, side)
    assert len(points.pos) == int(skull.sum()) > 10_000
    assert float(points.x.min()) > 300
    low, high = points.pos.amin(0), points.pos.amax(0)
    corners = grid.index_to_mm(torch.tensor([[0, 0, 0], [n - 1 for n in mask.shape[1:]]]), image.affine)
    assert bool((low >= corners.amin(0) - 1e-3).all())
    assert bool((high <= corners.amax(0) + 1e-3).all())

    cells = GridSampling3D(4.0, quantize_coords=True)(points)
    assert len(cells.pos) < len(points.pos)
    answer = data_from_sparse(nn.Conv3d(1, 1)(to_sparse_tensor(cells)), like=cells)
    assert answer.x.shape == (len(cells.pos), 1)
    filled = mask_from_points(answer, mask, within=mask)
    assert torch.equal(filled.affine, image.affine)
    right = (filled.as_tensor() == side.as_tensor().long())[skull].float().mean()
    assert float(right) > 0.97, "only cells across the middle may be wrong"
    assert not bool(filled.as_tensor()[~skull].any())

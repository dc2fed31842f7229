"""Masks made coarse and brought onto fine grids: against loops over voxel centers, in millimeters, in a Compose."""

from __future__ import annotations

import pickle
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, Orientation, Resize

from monai_memeff.geometry.grid import resize_affine
from monai_memeff.sparse.transforms.downsample_mask import (
    DownsampleMask,
    DownsampleMaskD,
    DownsampleMaskd,
    DownsampleMaskDict,
)
from monai_memeff.sparse.transforms.resample_to_grid import ResampleToGrid, ResampleToGridd

FINE = (9, 14, 5)
TILTED = torch.tensor(
    [[-0.8, 0.1, 0.0, 30.0], [0.1, 0.9, 0.3, -7.0], [0.05, -0.2, 2.0, 11.0], [0, 0, 0, 1]], dtype=torch.float64
)


def mask(shape: tuple[int, ...] = FINE, share: float = 0.2, seed: int = 0, channels: int = 1) -> torch.Tensor:
    """(C, H, W, D) uint8, about ``share`` of it 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(channels, *shape, generator=generator) < share).to(torch.uint8)


def owner(index: int, extent: int, others: int) -> int:
    """The voxel of a grid of ``others`` that holds the center of voxel ``index`` of ``extent``, in whole numbers."""
    return (2 * index + 1) * others // (2 * extent)


def shares(fine: torch.Tensor, cells: tuple[int, ...]) -> np.ndarray:
    """Per cell the share of its voxels that are 1, by loops; a cell that holds no center takes the voxel around it."""
    volume = fine[0].numpy()
    found = np.zeros(cells)
    members: dict[tuple[int, ...], list[int]] = {}
    for place in product(*map(range, volume.shape)):
        key = tuple(owner(i, n, c) if c <= n else -1 for i, n, c in zip(place, volume.shape, cells, strict=True))
        along = [
            [k] if k >= 0 else [j for j in range(c) if owner(j, c, n) == i]
            for k, i, n, c in zip(key, place, volume.shape, cells, strict=True)
        ]
        for cell in product(*along):
            members.setdefault(cell, []).append(int(volume[place]))
    for cell, values in members.items():
        found[cell] = np.mean(values)
    assert len(members) == np.prod(cells)
    return found


# Coarse


@pytest.mark.parametrize("cells", [(3, 7, 5), (4, 5, 2), (9, 14, 5), (1, 1, 1), (5, 3, 13)], ids=str)
def test_coarse_cells_against_loops(cells: tuple[int, ...]) -> None:
    """Whole and broken factors, one cell for all, and an axis with more cells than voxels."""
    fine = mask()
    wanted = shares(fine, cells)
    fraction, majority, some = (
        DownsampleMask(spatial_size=cells, mode=mode)(fine) for mode in ("fraction", "majority", "any")
    )
    np.testing.assert_allclose(fraction[0].numpy(), wanted, rtol=1e-6)
    assert np.array_equal(majority[0].numpy(), wanted >= 0.5 - 1e-12)
    assert np.array_equal(some[0].numpy(), wanted > 0)
    assert (fraction.dtype, majority.dtype, some.dtype) == (torch.float32, torch.uint8, torch.uint8)


def test_half_a_cell_is_a_majority_exactly() -> None:
    """Counts, not rounded means: 3 of 6 in cells of 1 x 2 x 3."""
    fine = torch.zeros(1, 4, 4, 6, dtype=torch.bool)
    fine[0, :, 0, :] = True
    assert DownsampleMask(factor=(1, 2, 3), mode="majority")(fine)[0].tolist() == [[[1, 1], [0, 0]]] * 4


@pytest.mark.parametrize(
    ("size", "wanted"),
    [({"factor": 4}, (3, 4, 2)), ({"factor": (1, 2.5, 5)}, (9, 6, 1)), ({"spatial_size": (4, -1, 2)}, (4, 14, 2))],
    ids=str,
)
def test_how_many_cells(size: dict[str, Any], wanted: tuple[int, ...]) -> None:
    assert DownsampleMask(**size)(mask()).shape[1:] == wanted


def test_cells_in_millimeters_follow_the_spacing() -> None:
    image = MetaTensor(mask(), affine=torch.diag(torch.tensor([-1.0, 0.5, 3.0, 1.0])))
    coarse = DownsampleMask(pixdim=(3.0, 3.0, 6.0))(image)
    assert coarse.shape[1:] == (3, 3, 3)  # 9, 7 and 15 mm
    with pytest.raises(ValueError, match="pixdim needs a MetaTensor"):
        DownsampleMask(pixdim=3)(mask())


def test_a_metatensor_keeps_its_space_as_monais_resize_does() -> None:
    image = MetaTensor(mask(), affine=TILTED, meta={"filename_or_obj": "a.nii"})
    coarse = DownsampleMask(spatial_size=(4, 5, 2))(image)
    theirs = Resize((4, 5, 2), mode="area")(image.float())
    torch.testing.assert_close(coarse.affine, theirs.affine)
    assert coarse.meta["filename_or_obj"] == "a.nii"
    assert not isinstance(DownsampleMask(factor=2)(mask()), MetaTensor)


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("mode", ["any", "majority"])
def test_empty_and_full_stay_so(fill: int, mode: str) -> None:
    coarse = DownsampleMask(factor=4, mode=mode)(torch.full((2, *FINE), fill))
    assert bool((coarse == fill).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of factor"),
        ({"factor": 2, "spatial_size": 3}, "give one of factor"),
        ({"factor": 0.5}, "factor must be at least 1"),
        ({"spatial_size": (4, 0, 4)}, "spatial_size must be at least 1, or -1"),
        ({"factor": 2, "mode": "most"}, "mode must be one of any, majority, fraction, got 'most'"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DownsampleMask(**arguments)


# Placed


@pytest.mark.parametrize("cells", [(3, 7, 5), (4, 5, 2), (1, 1, 1), (5, 3, 13)], ids=str)
def test_repeat_takes_the_cell_that_holds_the_center(cells: tuple[int, ...]) -> None:
    coarse, fine = mask(cells, 0.5), mask()
    placed = ResampleToGrid("repeat")(coarse, fine)
    for place in product(*map(range, FINE)):
        cell = tuple(owner(i, n, c) for i, n, c in zip(place, FINE, cells, strict=True))
        assert placed[(0, *place)] == coarse[(0, *cell)]
    assert placed.dtype == torch.uint8


@pytest.mark.parametrize("cells", [(3, 7, 5), (4, 5, 2)], ids=str)
def test_what_was_made_coarse_covers_its_origin(cells: tuple[int, ...]) -> None:
    """Any-coarse and repeated: a superset of the fine mask, and coarse again it is the same."""
    fine, coarsen = mask(share=0.05), DownsampleMask(spatial_size=cells)
    placed = ResampleToGrid()(coarsen(fine), fine)
    assert bool((placed >= fine).all())
    assert torch.equal(coarsen(placed), coarsen(fine))


@pytest.mark.parametrize("mode", ["center", "corner"])
def test_one_voxel_per_cell(mode: str) -> None:
    coarse = mask((3, 7, 5), 0.4, channels=2)
    placed = ResampleToGrid(mode)(coarse, torch.zeros(1, 12, 28, 10))
    assert int(placed.sum()) == int(coarse.sum())
    offset = torch.tensor([0, 0, 0, 0] if mode == "corner" else [0, 2, 2, 1])  # an even cell's center is a face
    assert torch.equal(placed.nonzero(), coarse.nonzero() * torch.tensor([1, 4, 4, 2]) + offset)


@pytest.mark.parametrize("mode", ["repeat", "center", "corner", "trilinear"])
@pytest.mark.parametrize("axes", ["LPS", "SAR", "tilted"])
def test_by_affine_as_by_extent(mode: str, axes: str) -> None:
    """The same space told by affines gives the same voxels; here also with the coarse grid's axes turned."""
    fine = MetaTensor(mask((8, 12, 6)), affine=TILTED if axes == "tilted" else torch.diag(torch.tensor([1.0, 2, 3, 1])))
    coarse = DownsampleMask(spatial_size=(4, 5, 3))(fine)
    turned = coarse if axes == "tilted" else Orientation(axcodes=axes, labels=None)(coarse)
    found, wanted = ResampleToGrid(mode)(turned, fine), ResampleToGrid(mode, "extent")(coarse, fine)
    assert isinstance(found, MetaTensor)
    torch.testing.assert_close(found.affine, fine.affine)
    if mode == "corner" and axes != "tilted":
        assert int(found.sum()) == int(wanted.sum())  # the first corner is another one where axes are turned
        assert bool((ResampleToGrid()(turned, fine) >= found).all())
        return
    differing = int((found != wanted).sum()) if mode != "trilinear" else 0
    allowed = int(coarse.sum()) if mode == "center" and axes != "tilted" else 0  # centers on faces fall either way
    assert differing <= allowed
    if mode == "trilinear":
        torch.testing.assert_close(found.as_tensor(), wanted.as_tensor(), atol=1e-5, rtol=0)


def test_repeat_across_a_tilt_against_millimeters() -> None:
    """A coarse volume of another tilt and extent: every fine center looked up in millimeters; outside is 0."""
    fine = MetaTensor(mask(), affine=torch.diag(torch.tensor([1.0, 1.0, 2.0, 1.0])))
    affine = torch.linalg.inv(TILTED) * 1.0
    affine[:3, :3] *= 3
    affine[:3, 3] = torch.tensor([6.0, -1.0, 2.0])
    coarse = MetaTensor(mask((5, 4, 6), 0.6), affine=affine)
    placed = ResampleToGrid()(coarse, fine)
    inside = 0
    for place in product(*map(range, FINE)):
        point = fine.affine @ torch.tensor([*place, 1.0], dtype=torch.float64)
        cell = torch.linalg.solve(affine, point)[:3].add(0.5 + 1e-5).floor().long().tolist()
        there = all(0 <= c < n for c, n in zip(cell, (5, 4, 6), strict=True))
        inside += there
        assert placed[(0, *place)] == (coarse[(0, *cell)] if there else 0)
    assert 0 < inside < fine.numel()


def test_trilinear_is_torchs() -> None:
    coarse = torch.rand(2, 4, 5, 3)
    found = ResampleToGrid("trilinear")(coarse, mask())
    theirs = torch.nn.functional.interpolate(coarse[None], FINE, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0)


def test_grids_that_do_not_meet_are_refused() -> None:
    fine = MetaTensor(mask(), affine=torch.eye(4))
    away = torch.eye(4)
    away[:3, 3] = 100
    with pytest.raises(ValueError, match="no occupied cell of the coarse mask lies in the fine grid"):
        ResampleToGrid()(MetaTensor(mask(), affine=away), fine)
    assert not ResampleToGrid()(MetaTensor(torch.zeros(1, 3, 3, 3), affine=away), fine).any()
    with pytest.raises(ValueError, match="needs two MetaTensors"):
        ResampleToGrid(align="affine")(mask(), fine)
    with pytest.raises(ValueError, match=r"takes \(C, H, W, D\), got \(9, 14, 5\)"):
        ResampleToGrid()(mask()[0], fine)


@pytest.mark.slow
def test_a_grid_of_512_x_512_x_any_from_128_cubed() -> None:
    """No full-size copy beside the mask itself: what is live never exceeds a few bytes per fine voxel."""
    from monai_memeff.memory import measure_peak

    fine = torch.zeros(1, 512, 512, 61, dtype=torch.uint8)
    fine[0, 200:260, 100:180, 13:31] = 1
    with measure_peak() as meter:
        placed = ResampleToGrid()(DownsampleMask(spatial_size=128, mode="majority")(fine), fine)
    assert placed.shape == fine.shape
    overlap = 2 * int((placed & fine).sum()) / int(placed.sum() + fine.sum())
    assert overlap > 0.97
    assert meter.peak_bytes < 4 * fine.numel()


# Dictionaries


def test_dictionary_versions() -> None:
    fine = MetaTensor(mask(), affine=TILTED)
    steps = Compose(
        [
            Flipd("label", spatial_axis=0),
            DownsampleMaskd("label", coarse_key="coarse", factor=2, mode="majority"),
            ResampleToGridd("coarse", reference_key="label", placed_key="image", mode="center"),
        ]
    )
    data = steps({"label": fine})
    assert set(data) == {"label", "coarse", "image"}
    assert torch.equal(data["coarse"], DownsampleMask(factor=2, mode="majority")(fine.flip(1)))
    torch.testing.assert_close(data["image"].affine, data["label"].affine)
    assert data["image"].applied_operations == data["label"].applied_operations
    replaced = ResampleToGridd("x", "y")(DownsampleMaskd("x", factor=2)({"x": fine, "y": fine}))
    assert replaced["x"].shape == fine.shape
    assert ResampleToGridd("absent", "y", allow_missing_keys=True)({"y": fine}).keys() == {"y"}
    assert DownsampleMaskD is DownsampleMaskDict is DownsampleMaskd
    again = pickle.loads(pickle.dumps(steps))({"label": fine})
    assert torch.equal(again["image"], data["image"])


def test_affine_of_the_coarse_grid() -> None:
    """The first and last cell's outer faces stay where the fine grid's are."""
    coarse = DownsampleMask(spatial_size=(4, 5, 2))(MetaTensor(mask(), affine=TILTED))
    torch.testing.assert_close(coarse.affine, resize_affine(TILTED, FINE, (4, 5, 2)))
    faces = torch.tensor([[-0.5, -0.5, -0.5, 1.0], [3.5, 4.5, 1.5, 1.0]], dtype=torch.float64)
    fine_faces = torch.tensor([[-0.5, -0.5, -0.5, 1.0], [8.5, 13.5, 4.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(faces @ coarse.affine.T, fine_faces @ TILTED.T)

"""A head of any geometry on the cubic grid: the same skull, in the same place, whatever the axes of the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nibabel.affines import from_matvec

from monai_memeff.apps.skull.demo.volume import (
    HeadVolume,
    load_head,
    prepare_head,
    resample_to_grid,
    skull_cube,
)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def _world(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]


def test_the_grid_holds_the_skull_where_it_is(ct: MetaTensor, head: HeadVolume) -> None:
    assert head.skull.shape == (64, 64, 64)
    assert head.size == 64
    assert 2.5 < head.cell_mm < 4.0
    assert 0.05 < head.occupancy < 0.2
    assert 0.3 < head.fill < 1.0
    bone = _world(head.bone, head.ct_affine)
    cells = _world(head.skull, head.affine)
    inside = bone[bone[:, 2] > head.affine[2, 3] - head.cell_mm]
    np.testing.assert_allclose(cells.max(axis=0), inside.max(axis=0), atol=1.5 * head.cell_mm)
    np.testing.assert_allclose(cells.min(axis=0)[:2], inside.min(axis=0)[:2], atol=1.5 * head.cell_mm)
    index = np.rint((inside - head.affine[:3, 3]) / head.cell_mm).astype(int)
    assert head.skull[tuple(index.clip(0).T)].mean() > 0.95
    assert not head.skull[[0, -1]].any()
    assert not head.skull[:, [0, -1]].any()
    assert not head.skull[:, :, -1].any()


def test_the_tensor_carries_the_affine(head: HeadVolume) -> None:
    tensor = head.tensor()
    assert tensor.shape == (1, 64, 64, 64)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor[0].numpy() > 0, head.skull)
    np.testing.assert_array_equal(tensor.affine, head.affine)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flip", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.slow
def test_orientation_of_the_image_does_not_matter(
    ct: MetaTensor, head: HeadVolume, order: tuple[int, ...], flip: tuple[int, ...]
) -> None:
    values = ct[0].numpy().transpose(order)
    affine = np.asarray(ct.affine)[:, [*order, 3]].copy()
    for axis in flip:
        affine[:3, 3] += affine[:3, axis] * (values.shape[axis] - 1)
        affine[:, axis] *= -1
    turned = MetaTensor(torch.from_numpy(np.flip(values, flip).copy())[None], affine=torch.from_numpy(affine))
    other = prepare_head(turned, size=64)
    np.testing.assert_allclose(other.affine, head.affine, atol=1e-6)
    assert _dice(other.skull, head.skull) > 0.9999


@pytest.mark.slow
def test_oblique_and_anisotropic_images_give_the_same_skull(
    ct: MetaTensor, head: HeadVolume, skewed: np.ndarray
) -> None:
    source = np.asarray(ct.affine)
    values = resample_to_grid(ct[0].numpy() + 1000, source, skewed, (120, 110, 96)) - 1000
    other = prepare_head(MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(skewed)), size=64)
    assert any("anisotropic" in note for note in other.notes)
    assert any("oblique" in note for note in other.notes)
    assert other.cell_mm == pytest.approx(head.cell_mm, rel=0.05)
    carried = (
        resample_to_grid(other.skull.astype(np.float32), other.affine, head.affine, head.skull.shape, order=0) > 0.5
    )
    assert _dice(carried, head.skull) > 0.8


def test_a_head_holder_is_left_out(ct: MetaTensor, head: HeadVolume) -> None:
    values = ct.clone()
    values[0, 5:-5, 0:2, :] = 1500.0
    other = prepare_head(values, size=64)
    np.testing.assert_array_equal(other.bone, head.bone)
    np.testing.assert_array_equal(other.skull, head.skull)
    assert any("left out" in note for note in other.notes)
    assert not any("cut off" in note for note in other.notes)


def test_a_vault_that_is_cut_off_is_said(ct: MetaTensor) -> None:
    assert any("cut off" in note for note in prepare_head(ct[..., :70], size=64).notes)


def test_the_image_is_left_as_it_was(ct: MetaTensor) -> None:
    before = ct.clone()
    prepare_head(ct, size=64)
    assert torch.equal(before, ct)


@pytest.mark.slow
def test_a_finer_grid_has_thinner_bone(ct: MetaTensor, head: HeadVolume) -> None:
    fine = prepare_head(ct, size=128)
    assert fine.skull.shape == (128, 128, 128)
    assert fine.fill > head.fill
    assert fine.occupancy < head.occupancy
    carried = resample_to_grid(fine.skull.astype(np.float32), fine.affine, head.affine, head.skull.shape) > 0.01
    assert _dice(carried, head.skull) > 0.9


@pytest.mark.slow
def test_a_generated_head_is_the_default() -> None:
    first = load_head(None, 64, seed=1)
    assert first.name == "generated head (seed 1)"
    assert 0.05 < first.occupancy < 0.2


@pytest.mark.exhaustive
def test_real_heads(data_dir: Path) -> None:
    folder = data_dir / "head_ct"
    head = load_head(folder / "vhf_head_ct.nii.gz", 64)
    assert 25_000 < head.skull.sum() < 32_000
    assert head.bone.shape == (512, 512, 234)
    assert 3.0 < head.cell_mm < 3.5
    small = load_head(folder / "vtk_headsq_quarter.nii.gz", 64)
    assert any("cut off" in note for note in small.notes)


# The small tools


def test_resample_reads_a_linear_ramp_anywhere(skewed: np.ndarray) -> None:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (40, 42, 44)), indexing="ij"), axis=-1)
    world = index @ skewed[:3, :3].T + skewed[:3, 3]
    ramp = (world @ np.array([0.3, -0.2, 0.5])).astype(np.float32)
    middle = skewed[:3, :3] @ [19.5, 20.5, 21.5] + skewed[:3, 3]
    target = from_matvec(np.eye(3) * 1.6, middle - 7.2)
    got = resample_to_grid(ramp, skewed, target, (10, 10, 10))
    cells = np.stack(np.meshgrid(*(np.arange(10),) * 3, indexing="ij"), axis=-1) @ target[:3, :3].T + target[:3, 3]
    np.testing.assert_allclose(got, cells @ np.array([0.3, -0.2, 0.5]), atol=1e-3)


def test_the_cube_hangs_from_the_vertex() -> None:
    bone = np.zeros((100, 120, 150), bool)
    bone[20:80, 10:110, 20:140] = True  # a body 60 x 100 x 120 mm
    bone[0:100, 0:120, 0:25] = True  # shoulders below
    corner, edge = skull_cube(bone, np.eye(4))
    assert edge == pytest.approx(99 * 1.1)
    assert corner[2] + edge == pytest.approx(139 + 99 * 0.05)
    assert corner[1] + edge / 2 == pytest.approx(59.5)

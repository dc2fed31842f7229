"""Millimeters mean the same everywhere: a volume in LPS and the same volume in RAS give the same world."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.utils import SpaceKeys

from monai_memeff.apps.skull.demo.volume import prepare_head
from monai_memeff.apps.skull.upper_skull import UpperSkullCrop
from monai_memeff.apps.skull.vault import vault_mask
from monai_memeff.clstm.slabs import check_that_slabs_continue
from monai_memeff.data import read_volume, save_nifti
from monai_memeff.geometry import ras_affine, space_of, to_ras
from monai_memeff.occupancy.mesh import labels_to_mesh, logits_to_mesh, write_mesh
from monai_memeff.sparse.points import mask_from_points, points_from_mask
from monai_memeff.sparse.transforms.resample_to_grid import ResampleToGrid

RAS = torch.tensor(
    [[-0.9, 0.1, 0.0, 60.0], [0.1, 1.1, 0.0, 185.0], [0.0, 0.0, 2.0, -30.0], [0, 0, 0, 1]], dtype=torch.float64
)


def pair(values: torch.Tensor, affine: torch.Tensor = RAS) -> tuple[MetaTensor, MetaTensor]:
    """One volume whose affine leads to RAS, and the same one as MONAI reads it with ``affine_lps_to_ras=False``."""
    lps = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)) @ affine
    return (
        MetaTensor(values.clone(), meta={"affine": affine.clone(), "space": SpaceKeys.RAS}),
        MetaTensor(values.clone(), meta={"affine": lps, "space": SpaceKeys.LPS}),
    )


def cube() -> torch.Tensor:
    values = torch.zeros(1, 9, 10, 11)
    values[0, 5:7, 3:6, 4:9] = 1
    return values


@pytest.mark.parametrize(
    ("name", "signs"),
    [
        ("RAS", (1, 1)), ("LPS", (-1, -1)), ("LAS", (-1, 1)), ("left-posterior-superior", (-1, -1)),
        ("right-anterior-superior", (1, 1)), (SpaceKeys.LPS, (-1, -1)), ([SpaceKeys.LPS], (-1, -1)), (None, None),
    ],
)  # fmt: skip
def test_every_name_of_a_space_is_known_or_refused(name: object, signs: tuple[int, int] | None) -> None:
    image = MetaTensor(torch.zeros(1, 2, 2, 2), affine=torch.eye(4, dtype=torch.float64))
    image.meta["space"] = name
    if signs is None:
        with pytest.raises(ValueError, match="the space None, and RAS, LPS, LAS are known"):
            ras_affine(image)
        return
    assert ras_affine(image).diagonal().tolist() == [*signs, 1, 1]
    assert torch.equal(to_ras(ras_affine(image), space_of(image)), image.affine)


@pytest.mark.parametrize("space", ["scanner-xyz", "left-anterior-inferior", "right-posterior-superior", "", 7])
def test_unknown_spaces_are_refused_by_every_user_of_millimeters(space: object) -> None:
    image = MetaTensor(cube(), affine=RAS)
    image.meta["space"] = space
    for use in (labels_to_mesh, points_from_mask, logits_to_mesh, vault_mask, UpperSkullCrop(3, front=None)):
        with pytest.raises(ValueError, match="are known"):
            use(image)
    with pytest.raises(ValueError, match="space must be one of RAS, LPS, LAS, got"):
        to_ras(RAS, str(space))


def test_the_points_of_54_and_190_millimeters() -> None:
    mask = torch.zeros(1, 4, 4, 4)
    mask[0, 1, 2, 3] = 1
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = torch.tensor([53.6, 188.3, -3.0])
    for image in pair(mask, affine):
        torch.testing.assert_close(points_from_mask(image).pos, torch.tensor([[54.6, 190.3, 0.0]]))
        middle = labels_to_mesh(image).vertices.mean(axis=0)
        np.testing.assert_allclose(middle, [54.6, 190.3, 0.0], atol=1e-5)


def test_meshes_are_the_same_and_a_file_in_lps_is_turned_once(tmp_path: Path) -> None:
    right, turned = (labels_to_mesh(image) for image in pair(cube()))
    np.testing.assert_allclose(right.vertices, turned.vertices, atol=1e-9)
    np.testing.assert_array_equal(right.faces, turned.faces)
    logits = [logits_to_mesh(image) for image in pair(cube() - 0.3)]
    np.testing.assert_allclose(logits[0].vertices, logits[1].vertices, atol=1e-9)
    written = []
    for number, mesh in enumerate((right, turned)):
        write_mesh(tmp_path / f"{number}.stl", mesh)
        written.append((tmp_path / f"{number}.stl").read_bytes())
    assert written[0] == written[1]
    count = struct.unpack_from("<I", written[0], 80)[0]
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")])
    corners = np.frombuffer(written[0], record, count, 84)["corners"]
    middle = corners.reshape(-1, 3).min(0) / 2 + corners.reshape(-1, 3).max(0) / 2
    center = RAS @ torch.tensor([5.5, 4.0, 6.0, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(middle, [-center[0], -center[1], center[2]], atol=1e-3)
    assert b"SPACE=LPS" in written[0][:80]


def test_the_own_affine_of_a_volume_in_lps_is_not_taken_for_ras(tmp_path: Path) -> None:
    """What is written with it would be the mirror image."""
    right, turned = pair(cube())
    for write in (
        lambda volume: save_nifti(tmp_path / "x.nii", volume[0], volume.affine),
        lambda volume: labels_to_mesh(volume, volume.affine),
        lambda volume: logits_to_mesh(volume - 0.3, volume.affine.numpy()),
    ):
        write(right)
        with pytest.raises(ValueError, match="leads to LPS and not to RAS"):
            write(turned)
    np.testing.assert_allclose(labels_to_mesh(turned, ras_affine(turned)).vertices, labels_to_mesh(right).vertices)
    save_nifti(tmp_path / "y.nii", turned[0], ras_affine(turned))
    written = [read_volume(tmp_path / name).image for name in ("x.nii", "y.nii")]
    assert torch.equal(written[0].affine, written[1].affine)
    assert torch.equal(*(image.as_tensor() for image in written))


def test_a_batch_says_the_space_of_every_item_or_of_all() -> None:
    both = list_data_collate([{"image": volume} for volume in pair(cube())[::-1]])["image"]
    expected = [ras_affine(volume) for volume in pair(cube())[::-1]]
    for number, item in enumerate(decollate_batch(both)):
        assert torch.equal(ras_affine(both, number), expected[number])
        assert torch.equal(ras_affine(item), expected[number])
        assert torch.equal(ras_affine(both[number]), expected[number])
    with pytest.raises(ValueError, match="2 affines, and that of item 2 is needed"):
        ras_affine(both, 2)
    both.affine = torch.stack([*both.affine, RAS])
    with pytest.raises(ValueError, match="2 spaces, and that of item 2 is needed"):
        ras_affine(both, 2)


def test_a_batch_of_both_spaces() -> None:
    first, second = pair(cube()[None])
    batch = MetaTensor(cube()[None], affine=torch.stack([second.affine]))
    batch.meta["space"] = [SpaceKeys.LPS]
    np.testing.assert_allclose(labels_to_mesh(batch).vertices, labels_to_mesh(first).vertices, atol=1e-9)


def test_points_go_back_onto_the_grid_they_came_from() -> None:
    for source in pair(cube()):
        for target in pair(cube()):
            back = mask_from_points(points_from_mask(source), target, values=None)
            torch.testing.assert_close(back.as_tensor().float(), cube())
            torch.testing.assert_close(back.affine, target.affine)
            assert space_of(back) == space_of(target)


def test_grids_of_both_spaces_lie_over_each_other() -> None:
    coarse = torch.zeros(1, 4, 4, 4)
    coarse[0, 1, 2, 3] = coarse[0, 3, 0, 1] = 1
    finer = RAS.clone()
    finer[:3, :3] /= 2
    finer[:3, 3] -= finer[:3, :3].sum(1) / 2
    expected = None
    for low in pair(coarse):
        for high in pair(torch.zeros(1, 8, 8, 8), finer):
            placed = ResampleToGrid("repeat", align="affine")(low, high).as_tensor()
            expected = placed if expected is None else expected
            assert placed.sum() == 16
            assert torch.equal(placed, expected)


def test_skulls_have_their_face_in_front_in_both_spaces() -> None:
    skull = torch.ones(1, 8, 10, 6)
    crops = [UpperSkullCrop(6, face=2)(image).as_tensor() for image in pair(skull)]
    assert torch.equal(crops[0], crops[1])
    assert crops[0].sum() < skull.sum()
    assert torch.equal(*(vault_mask(image) for image in pair(skull)))


def test_slabs_of_both_spaces_follow_each_other() -> None:
    first, _ = pair(torch.zeros(1, 1, 4, 4, 3))
    moved = RAS.clone()
    moved[:3, 3] += 3 * RAS[:3, 2]
    for second in pair(torch.zeros(1, 1, 4, 4, 3), moved):
        assert len(list(check_that_slabs_continue([first, second], 2))) == 2
    moved[:3, 3] += RAS[:3, 2]
    _, off = pair(torch.zeros(1, 1, 4, 4, 3), moved)
    with pytest.raises(ValueError, match="does not continue"):
        list(check_that_slabs_continue([first, off], 2))


@pytest.mark.slow
def test_a_head_is_the_same_head_in_both_spaces() -> None:
    x = np.linspace(-1, 1, 70)
    r = np.sqrt(x[:, None, None] ** 2 + x[None, :, None] ** 2 + 1.2 * x[None, None, :] ** 2)
    values = np.where((r < 0.85) & (r > 0.75), 1000, -1000).astype(np.float32)
    values[60:, 30:40] = 900  # an ear
    affine = torch.diag(torch.tensor([-2.5, -2.5, 2.5, 1.0], dtype=torch.float64))
    heads = [prepare_head(image) for image in pair(torch.from_numpy(values)[None], affine)]
    np.testing.assert_array_equal(heads[0].skull, heads[1].skull)
    np.testing.assert_allclose(heads[0].affine, heads[1].affine)
    np.testing.assert_allclose(heads[0].ct_affine, heads[1].ct_affine)

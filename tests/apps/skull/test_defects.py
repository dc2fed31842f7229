"""Random skull defects: exact partition, place, size, kinds, orientation, random state and refusals."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy import ndimage

from monai_memeff.apps.skull.defects import (
    KINDS,
    RandSkullDefect,
    RandSkullDefectD,
    RandSkullDefectd,
    RandSkullDefectDict,
)
from monai_memeff.apps.skull.vault import vault_mask


def _shell(shape: tuple[int, int, int] = (40, 48, 44)) -> torch.Tensor:
    """An ellipsoid shell with a blob of a face low in front; (1, H, W, D), asymmetric."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    r = np.sqrt((x / 0.75) ** 2 + (y / 0.9) ** 2 + (z / 0.85) ** 2)
    skull = (r <= 1) & (r >= 0.82) & (z > -0.7)
    skull |= (np.abs(x - 0.1) < 0.3) & (y > 0.4) & (y < 0.9) & (z < -0.2) & (z > -0.8)
    return torch.from_numpy(skull[None].astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_defective_and_implant_are_a_partition(kind: str) -> None:
    skull = _shell()
    before = skull.clone()
    defect = RandSkullDefect(kind=kind).set_random_state(3)
    for _ in range(10):
        defective, implant = defect(skull)
        assert torch.equal(defective + implant, before)
        assert not (defective.bool() & implant.bool()).any()
        assert implant.sum() >= np.pi * (0.10 * 48) ** 2 / 4
    assert torch.equal(skull, before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_dtype_and_channels_are_kept(dtype: torch.dtype) -> None:
    skull = torch.cat([_shell(), _shell() * 0]).to(dtype)
    skull[1, :20] = skull[0, :20]
    defective, implant = RandSkullDefect().set_random_state(0)(skull)
    assert defective.dtype == implant.dtype == dtype
    assert torch.equal(defective.int() + implant.int(), skull.int())


def test_defects_lie_in_the_vault_and_cover_it() -> None:
    skull = _shell()
    vault = vault_mask(skull)
    defect = RandSkullDefect().set_random_state(1)
    heights, sides = [], []
    for _ in range(40):
        _, implant = defect(skull)
        assert (implant[0].bool() & vault).sum() >= 0.8 * implant.sum()
        center = torch.nonzero(implant[0]).float().mean(dim=0)
        heights.append(float(center[2]))
        sides.append(float(center[0]))
    assert min(sides) < 12 < 28 < max(sides)
    assert max(heights) - min(heights) > 8


@pytest.mark.parametrize(("axis", "sign"), [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1)])
def test_up_comes_from_the_affine(axis: int, sign: int) -> None:
    skull = _shell()
    vault = vault_mask(skull)
    order = [a for a in range(3) if a != 2]
    order.insert(axis, 2)
    flipped = (lambda t: t.flip(axis)) if sign < 0 else (lambda t: t)
    moved = flipped(skull[0].permute(order))
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order]
    affine[:, axis] *= sign
    got = vault_mask(MetaTensor(moved[None].contiguous(), affine=torch.from_numpy(affine)))
    assert torch.equal(got, flipped(vault.permute(order)))


def test_vault_is_measured_in_millimeters() -> None:
    skull = _shell()
    affine = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    thin = skull[..., ::3].contiguous()
    top = int(torch.nonzero(vault_mask(skull))[:, 2].min())
    got = int(torch.nonzero(vault_mask(MetaTensor(thin, affine=affine)))[:, 2].min())
    assert abs(3 * got - top) <= 3


def test_kinds_differ_and_spheres_and_cubes_are_exact() -> None:
    solid = torch.ones(1, 60, 60, 60)
    sphere = RandSkullDefect(kind="sphere", size=(0.15, 0.15), region="anywhere").set_random_state(0)(solid)[1]
    cube = RandSkullDefect(kind="cube", size=(0.15, 0.15), region="anywhere").set_random_state(2)(solid)[1]
    for implant, inside in ((sphere, 4 / 3 * np.pi * 9**3), (cube, 19.0**3)):
        box = torch.nonzero(implant[0])
        extent = box.max(dim=0).values - box.min(dim=0).values + 1
        assert (extent <= 19).all()
        if (extent == 19).all():
            assert float(implant.sum()) == pytest.approx(inside, rel=0.05)
    free = RandSkullDefect(kind="freeform", size=(0.15, 0.15), region="anywhere").set_random_state(5)
    shapes = {int(free(solid)[1].sum()) for _ in range(5)}
    assert len(shapes) == 5


def test_freeform_is_one_piece_inside_its_reach() -> None:
    solid = torch.ones(1, 96, 96, 96)
    free = RandSkullDefect(kind="freeform", size=(0.1, 0.1), region="anywhere").set_random_state(7)
    for _ in range(8):
        implant = free(solid)[1][0].numpy()
        labels, _ = ndimage.label(implant)
        assert np.bincount(labels.ravel())[1:].max() >= 0.99 * implant.sum()


def test_random_state_decides_everything() -> None:
    skull = _shell()
    np.random.seed(0)
    first = [RandSkullDefect().set_random_state(5)(skull)[1] for _ in range(2)]
    assert torch.equal(first[0], first[1])
    defect = RandSkullDefect().set_random_state(5)
    again = defect(skull)[1]
    assert torch.equal(again, first[0])
    assert torch.equal(defect(skull, randomize=False)[1], again)
    assert not torch.equal(defect(skull)[1], again)
    assert torch.equal(pickle.loads(pickle.dumps(RandSkullDefect().set_random_state(5)))(skull)[1], again)


def test_without_a_defect_the_skull_is_whole() -> None:
    skull = _shell()
    defective, implant = RandSkullDefect(prob=0.0)(skull)
    assert torch.equal(defective, skull)
    assert not implant.any()
    defect = RandSkullDefect(prob=0.5).set_random_state(0)
    cut = sum(bool(defect(skull)[1].any()) for _ in range(60))
    assert 15 < cut < 45


def test_dictionary_version_adds_two_keys_and_keeps_the_affine() -> None:
    affine = torch.tensor([[-2.0, 0, 0, 5], [0, -2.0, 0, 6], [0, 0, 2.0, 7], [0, 0, 0, 1]], dtype=torch.float64)
    skull = MetaTensor(_shell(), affine=affine)
    transform = Compose([RandSkullDefectd("skull", defective_key="holed", implant_key="patch")])
    transform.set_random_state(4)
    out = transform({"skull": skull, "other": 1})
    assert set(out) == {"skull", "other", "holed", "patch"}
    assert isinstance(out["holed"], MetaTensor)
    assert torch.equal(out["patch"].affine, affine)
    assert torch.equal(out["holed"].as_tensor() + out["patch"].as_tensor(), skull.as_tensor())
    assert torch.equal(transform.set_random_state(4)({"skull": skull})["patch"], out["patch"])
    assert RandSkullDefectd("skull", allow_missing_keys=True)({"x": 1}) == {"x": 1}
    assert RandSkullDefectD is RandSkullDefectDict is RandSkullDefectd


def test_bad_skulls_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="empty"):
        RandSkullDefect()(torch.zeros(1, 32, 32, 32))
    crumb = torch.zeros(1, 64, 64, 64)
    crumb[0, 30:33, 30:33, 30:33] = 1
    with pytest.raises(ValueError, match="too small"):
        RandSkullDefect()(crumb)
    with pytest.raises(ValueError, match="channel first"):
        RandSkullDefect()(torch.ones(32, 32, 32))
    with pytest.raises(KeyError):
        RandSkullDefectd("skull")({})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "star"}, "kind must be"),
        ({"kind": ()}, "kind must be"),
        ({"region": "jaw"}, "region must be"),
        ({"size": (0.3, 0.2)}, "size must be"),
        ({"size": (0.0, 0.2)}, "size must be"),
        ({"size": (0.1, 0.6)}, "size must be"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RandSkullDefect(**arguments)


def test_keys_that_monai_would_take_for_metadata_are_refused() -> None:
    with pytest.raises(ValueError, match="Spacingd"):
        RandSkullDefectd("image", defective_key="image_holed")
    with pytest.raises(ValueError, match="must differ"):
        RandSkullDefectd("skull", defective_key="a", implant_key="a")
    with pytest.raises(ValueError, match="one complete skull"):
        RandSkullDefectd(["a", "b"])

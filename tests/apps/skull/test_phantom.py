"""The generated head and body: reproducible, asymmetric, anatomically ordered, and fixed in millimeters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from monai_memeff.apps.skull.phantom import HEAD_LABELS, Phantom, head_phantom
from tests.body_phantom import BODY_LABELS, body_phantom

SMALL = {"shape": (62, 75, 80), "spacing": 3.0}


@pytest.fixture(scope="module")
def head() -> Phantom:
    return head_phantom(**SMALL)


@pytest.fixture(scope="module")
def body() -> Phantom:
    return body_phantom()


def _center(phantom: Phantom, label: int) -> torch.Tensor:
    index = torch.nonzero(phantom.labels == label).double().mean(dim=0)
    return phantom.affine[:3, :3] @ index + phantom.affine[:3, 3]


@pytest.mark.parametrize("make", [head_phantom, body_phantom])
def test_same_seed_same_volume_whatever_the_global_state(make: object) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make(shape=(40, 44, 48), spacing=5.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = make(shape=(40, 44, 48), spacing=5.0, seed=3)
    other = make(shape=(40, 44, 48), spacing=5.0, seed=4)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.labels, again.labels)
    assert (first.labels != other.labels).float().mean() > 0.001


def test_values_are_a_ct(head: Phantom, body: Phantom) -> None:
    for phantom in (head, body):
        assert phantom.image.dtype == torch.float32
        assert phantom.labels.dtype == torch.int16
        assert phantom.affine.dtype == torch.float64
        assert torch.equal(phantom.image, phantom.image.round())
        assert phantom.image.min() >= -1024
        assert phantom.image.max() <= 3071
        assert phantom.image[0, 0, 0] < -900
        assert set(phantom.labels.unique().tolist()) == {0, *phantom.names.values()}


def test_the_skull_is_bone_around_the_brain_and_open_below(head: Phantom) -> None:
    skull, brain = head.labels == HEAD_LABELS["skull"], head.labels == HEAD_LABELS["brain"]
    assert (head.image[skull] > 300).float().mean() > 0.8
    assert (head.image[brain] < 150).float().mean() > 0.95
    assert 0.03 < (head.image > 300).float().mean() < 0.2
    middle = torch.nonzero(brain.any(dim=2)).float().mean(dim=0).round().long()
    top = torch.nonzero(skull[middle[0], middle[1]]).max()
    assert top > torch.nonzero(brain[middle[0], middle[1]]).max()
    below = head.affine[2, 3] + 3.0 * torch.arange(80) < -44.0
    assert brain[:, :, below].any(), "the brain must pass through the base"


def test_the_skull_is_not_symmetric(head: Phantom) -> None:
    skull = head.labels == HEAD_LABELS["skull"]
    mirrored = skull.flip(0)
    dice = 2 * (skull & mirrored).sum() / (2 * skull.sum())
    assert 0.3 < dice < 0.9


def test_thickness_varies(head: Phantom) -> None:
    fine = head_phantom(shape=(184, 8, 8), spacing=1.0)
    walls = []
    for row in (fine.labels == HEAD_LABELS["skull"]).permute(1, 2, 0).reshape(-1, 184):
        walls += [int(row[:92].sum()), int(row[92:].sum())]
    assert 2 <= min(walls) < max(walls) <= 14


def test_organs_lie_where_they_belong(body: Phantom) -> None:
    at = {name: _center(body, label) for name, label in BODY_LABELS.items()}
    assert at["liver"][0] > 20 > -20 > at["spleen"][0]
    assert at["right kidney"][0] > 0 > at["left kidney"][0]
    assert at["lungs"][2] > at["liver"][2] > at["bladder"][2]
    assert at["heart"][1] > at["bone"][1]
    assert body.image[body.labels == BODY_LABELS["lungs"]].mean() < -700
    assert body.image[body.labels == BODY_LABELS["bone"]].mean() > 200


def test_geometry_is_in_millimeters_not_voxels() -> None:
    coarse = body_phantom(shape=(56, 40, 60), spacing=7.0)
    fine = body_phantom(shape=(112, 80, 60), spacing=(3.5, 3.5, 7.0))
    for label in (BODY_LABELS["liver"], BODY_LABELS["lungs"], BODY_LABELS["left kidney"]):
        volume = [float((p.labels == label).sum()) * float(p.affine.diagonal()[:3].prod()) for p in (coarse, fine)]
        assert volume[0] == pytest.approx(volume[1], rel=0.15)
        assert torch.allclose(_center(coarse, label), _center(fine, label), atol=3.0)


def test_odd_and_tiny_fields_of_view() -> None:
    assert head_phantom(shape=(1, 5, 3), spacing=2.0).image.shape == (1, 5, 3)
    assert body_phantom(shape=(7, 1, 9), spacing=(2.0, 3.0, 4.0)).labels.shape == (7, 1, 9)
    with pytest.raises(ValueError, match="three positive"):
        head_phantom(shape=(8, 8))
    with pytest.raises(ValueError, match="three positive"):
        body_phantom(shape=(8, 8, 8), spacing=0.0)


@pytest.mark.slow
def test_needs_torch_alone() -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('p', sys.argv[1]); m = u.module_from_spec(s);"
        "sys.modules['p'] = m; s.loader.exec_module(m); m.head_phantom((8, 8, 8), 20.0);"
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'monai', 'scipy', 'skimage', 'nibabel', 'matplotlib'}))"
    )
    import monai_memeff.apps.skull.phantom as module

    done = subprocess.run(
        [sys.executable, "-c", code, str(module.__file__)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

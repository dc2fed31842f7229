"""A small generated head, a small MRI and their targets, for every test of this folder."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.apps.skull.phantom import Phantom, head_phantom
from monai_memeff.apps.systems.scan import Scan, prepare_scan


@pytest.fixture(scope="session")
def phantom() -> Phantom:
    return head_phantom((46, 56, 60), 4.0)


@pytest.fixture(scope="session")
def ct(phantom: Phantom) -> MetaTensor:
    return MetaTensor(phantom.image[None], affine=phantom.affine)


@pytest.fixture(scope="session")
def label(phantom: Phantom) -> MetaTensor:
    return MetaTensor(phantom.labels[None].float(), affine=phantom.affine)


@pytest.fixture(scope="session")
def mr() -> MetaTensor:
    """A ball of 100 to 200 in noise of about 10; anisotropic."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (40, 36, 20)), indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.5
    values = torch.where(inside, 150.0 + 50 * axes[0], 10.0 + 3 * axes[1])
    return MetaTensor(values[None], affine=torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64)))


@pytest.fixture(scope="session")
def scan(ct: MetaTensor, label: MetaTensor, phantom: Phantom) -> Scan:
    names = {value: name for name, value in phantom.names.items()}
    return prepare_scan(ct, label, "small head", voxels=20_000, names=names)

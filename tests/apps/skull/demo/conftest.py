"""One small generated head on the network's grid, with a defect on its left side, for every test of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from monai.data import MetaTensor

from monai_memeff.apps.skull.demo.volume import HeadVolume, prepare_head
from monai_memeff.apps.skull.phantom import head_phantom


@dataclass(frozen=True)
class Case:
    """A head, its skull without a defect, and the defect."""

    head: HeadVolume
    defective: np.ndarray
    truth: np.ndarray


@pytest.fixture(scope="session")
def ct() -> MetaTensor:
    phantom = head_phantom(shape=(74, 90, 96), spacing=2.5)
    return MetaTensor(phantom.image[None], affine=phantom.affine)


@pytest.fixture(scope="session")
def head(ct: MetaTensor) -> HeadVolume:
    return prepare_head(ct, size=64, name="small head")


@pytest.fixture(scope="session")
def case(head: HeadVolume) -> Case:
    """A ball cut out of the left side of the vault."""
    cells = np.stack(np.meshgrid(*(np.arange(64),) * 3, indexing="ij"), axis=-1)
    world = cells @ head.affine[:3, :3].T + head.affine[:3, 3]
    ball = np.linalg.norm(world - np.array([-55.0, -10.0, 45.0]), axis=-1) < 30
    truth = head.skull & ball
    assert truth.sum() > 300
    return Case(head, head.skull & ~truth, truth)


@pytest.fixture
def skewed() -> np.ndarray:
    """An affine whose axes are oblique and whose voxels are not cubes."""
    angle = np.radians(17)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.5, 2.0, 2.6])
    affine[:3, 3] = [70, -80, -110]
    return affine

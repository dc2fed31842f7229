"""Dropped voxels: how many, which, and under which random state."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from monai_memeff.sparse.transforms.voxel_dropout import (
    RandVoxelDropout,
    RandVoxelDropoutD,
    RandVoxelDropoutd,
    RandVoxelDropoutDict,
)

SHAPE = (2, 5, 7, 6)


def mask() -> MetaTensor:
    """(2, 5, 7, 6), about a third occupied, values 0 and 3."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(SHAPE, generator=generator) < 0.2) * 3
    return MetaTensor(values, affine=torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0], dtype=torch.float64)))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_a_share_of_the_voxels_goes(p: float) -> None:
    image = mask()
    before = image.clone()
    result = RandVoxelDropout(p).set_random_state(0)(image)
    occupied = image.as_tensor().any(0)
    left = result.as_tensor().any(0)
    assert int(left.sum()) == int(int(occupied.sum()) * (1 - p))
    assert not bool((left & ~occupied).any())
    assert torch.equal(result.as_tensor()[:, left], image.as_tensor()[:, left]), "all channels of a voxel or none"
    assert torch.equal(result.affine, image.affine)
    assert torch.equal(image, before)


def test_the_random_state_decides() -> None:
    image = mask()
    first, again, other = (RandVoxelDropout(0.3).set_random_state(seed)(image) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    pepper = RandVoxelDropout(0.3).set_random_state(1)
    assert torch.equal(pepper(image), first)
    assert torch.equal(pepper(image, randomize=False), first)
    assert not torch.equal(pepper(image), first)


def test_probability_and_empty_masks() -> None:
    image = mask()
    pepper = RandVoxelDropout(0.3, prob=0.5).set_random_state(0)
    changed = sum(not torch.equal(pepper(image), image) for _ in range(60))
    assert 15 < changed < 45
    assert not bool(RandVoxelDropout(0.5)(torch.zeros(1, 3, 3, 3)).any())


def test_in_a_dictionary() -> None:
    data = {"skull": mask(), "other": mask()}
    pipeline = Compose([RandVoxelDropoutd(("skull", "other"), 0.4)])
    result = pipeline.set_random_state(3)(data)
    assert not torch.equal(result["skull"], result["other"]), "a draw of its own for every mask"
    assert torch.equal(pipeline.set_random_state(3)(data)["other"], result["other"])
    assert torch.equal(data["skull"], mask())
    assert RandVoxelDropoutd("absent", 0.4, allow_missing_keys=True)(data) == data
    assert RandVoxelDropoutD is RandVoxelDropoutDict is RandVoxelDropoutd


def test_bad_input_is_refused() -> None:
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"p must be a finite number in 0 \.\.\. 1"):
            RandVoxelDropout(p)
    with pytest.raises(ValueError, match="channel first"):
        RandVoxelDropout(0.5)(torch.ones(3, 3, 3))

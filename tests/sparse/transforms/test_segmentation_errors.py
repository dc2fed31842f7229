"""Errors in coarse masks: where they may be, how many, under which random state, in a Compose."""

from __future__ import annotations

import pickle
from collections.abc import Hashable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy import ndimage

from monai_memeff.sparse.transforms.segmentation_errors import (
    RandSegmentationErrors,
    RandSegmentationErrorsD,
    RandSegmentationErrorsd,
    RandSegmentationErrorsDict,
)

SHAPE = (13, 10, 17)


def mask(channels: int = 1) -> torch.Tensor:
    """(C, 13, 10, 17): a block that touches the volume's border, and a single cell."""
    result = torch.zeros(channels, *SHAPE, dtype=torch.uint8)
    result[:, 4:11, 3:, 2:14] = 1
    result[:, 1, 1, 1] = 1
    return result


def edges(cells: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Boundary cells inside and outside of (h, w, d), with scipy; the volume's border is none."""
    volume = cells.numpy() > 0
    inside = volume & ~ndimage.binary_erosion(volume, border_value=1)
    return inside, ndimage.binary_dilation(volume) & ~volume


@pytest.mark.parametrize(("false_negatives", "false_positives"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)], ids=str)
def test_only_boundary_cells_flip_and_in_the_fractions_wanted(false_negatives: float, false_positives: float) -> None:
    """Shares are drawn evenly below the largest, so their mean over many masks is its half."""
    inside, outside = edges(mask()[0])
    noise = RandSegmentationErrors(false_negatives, false_positives, spots=0, prob=1.0).set_random_state(0)
    counts = np.zeros(2)
    for _ in range(300):
        changed = (noise(mask()) != mask())[0].numpy()
        assert not (changed & ~inside & ~outside).any()
        counts += (changed & inside).sum() / inside.sum(), (changed & outside).sum() / outside.sum()
    np.testing.assert_allclose(counts / 300, [false_negatives / 2, false_positives / 2], atol=0.06)


def test_spots_are_balls_of_the_size_asked_for() -> None:
    """Holes empty and islands fill, at most so many and so large."""
    noise = RandSegmentationErrors(0, 0, spots=1, radius=2.5, prob=1.0).set_random_state(0)
    ball = sum(i * i + j * j + k * k <= 2.5**2 for i, j, k in product(range(-2, 3), repeat=3))
    seen = {"hole": 0, "island": 0}
    for _ in range(60):
        result = noise(mask())
        for name, changed in (("hole", mask().logical_and(~result.bool())), ("island", result > mask())):
            cells = changed[0].nonzero()
            seen[name] += bool(len(cells))
            assert len(cells) <= ball
            assert not len(cells) or int((cells.amax(0) - cells.amin(0)).max()) <= 4
    assert 15 < seen["hole"] < 45
    assert 15 < seen["island"] < 45


def test_one_cell_where_the_radius_is_zero() -> None:
    noise = RandSegmentationErrors(0, 0, spots=1, radius=0, prob=1.0).set_random_state(1)
    assert {int((noise(mask()) != mask()).sum()) for _ in range(40)} == {0, 1, 2}


def test_the_random_state_decides() -> None:
    image = mask()
    first, again, other = (RandSegmentationErrors(prob=1).set_random_state(seed)(image) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    noise = RandSegmentationErrors(prob=1).set_random_state(1)
    assert torch.equal(noise(image), first)
    assert torch.equal(noise(image, randomize=False), first)
    assert not torch.equal(noise(image), first)
    assert torch.equal(image, mask())


def test_probability() -> None:
    noise = RandSegmentationErrors(prob=0.5).set_random_state(0)
    assert 20 < sum(not torch.equal(noise(mask()), mask()) for _ in range(80)) < 60
    assert torch.equal(RandSegmentationErrors(1, 1, prob=0.0)(mask()), mask())


def test_extremes() -> None:
    """Empty stays empty, full has no boundary, and something never becomes nothing."""
    for spots in (0, 3):
        noise = RandSegmentationErrors(1, 1, spots=spots, prob=1.0).set_random_state(0)
        assert not any(bool(noise(torch.zeros(1, 4, 5, 6)).any()) for _ in range(10))
    assert bool(RandSegmentationErrors(1, 1, spots=0, prob=1.0)(torch.ones(1, 4, 5, 6)).all())
    single = torch.zeros(1, 5, 4, 3)
    single[0, 2, 2, 1] = 7
    noise = RandSegmentationErrors(1, 0, spots=0, prob=1.0).set_random_state(0)
    assert all(torch.equal(noise(single), (single > 0).to(torch.uint8)) for _ in range(20))
    assert noise(torch.ones(1, 1, 1, 1)).tolist() == [[[[1]]]]


def test_channels_and_metadata() -> None:
    image = MetaTensor(mask(2), affine=torch.diag(torch.tensor([2.0, 1, 3, 1])), meta={"filename_or_obj": "a.nii"})
    result = RandSegmentationErrors(prob=1).set_random_state(0)(image)
    assert isinstance(result, MetaTensor)
    assert result.dtype == torch.uint8
    assert torch.equal(result.affine, image.affine)
    assert result.meta["filename_or_obj"] == "a.nii"
    assert not torch.equal(result[0], result[1])
    assert not isinstance(RandSegmentationErrors()(mask().numpy()), MetaTensor)


def test_in_a_dictionary() -> None:
    data: dict[Hashable, Any] = {"coarse": mask(), "other": mask()}
    pipeline = Compose([RandSegmentationErrorsd(("coarse", "other"), false_negatives=0.5, prob=1.0)])
    result = pipeline.set_random_state(3)(data)
    assert not torch.equal(result["coarse"], result["other"]), "a draw of its own for every mask"
    again = pickle.loads(pickle.dumps(pipeline)).set_random_state(3)(data)
    assert torch.equal(again["other"], result["other"])
    assert torch.equal(data["coarse"], mask())
    assert RandSegmentationErrorsd("absent", allow_missing_keys=True)(data).keys() == data.keys()
    assert RandSegmentationErrorsD is RandSegmentationErrorsDict is RandSegmentationErrorsd


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"false_negatives": 1.2}, "false_negatives must be a finite number in 0 ... 1, got 1.2"),
        ({"false_positives": -0.1}, "false_positives must be a finite number in 0 ... 1, got -0.1"),
        ({"prob": 2}, "prob must be a finite number in 0 ... 1, got 2"),
        ({"spots": 1.5}, "spots must be a whole number of at least 0, got 1.5"),
        ({"radius": -1}, "radius must be at least 0 cells, got -1"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    for kind in (RandSegmentationErrors, lambda **options: RandSegmentationErrorsd("x", **options)):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


def test_bad_volumes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \(C, H, W, D\), got \(13, 10, 17\)"):
        RandSegmentationErrors()(mask()[0])

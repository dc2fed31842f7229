"""Points to train on: the published recipe, balance, fixed numbers, reproducible, and what is refused."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.transforms import Compose, EnsureTyped, RandFlipd

from monai_memeff.occupancy import RandOccupancyPoints, RandOccupancyPointsd
from monai_memeff.occupancy.sampling import border_band
from tests.occupancy.reference import ball, sobel_band

SHAPE = (23, 30, 26)


def counts(values: torch.Tensor, labels: int) -> list[int]:
    """How many points have each label."""
    return torch.bincount(values, minlength=labels).tolist()


@pytest.mark.parametrize("sampling", ["uniform", "border", "balanced", {"uniform": 0.25, "balanced": 0.75}])
@pytest.mark.parametrize("kind", ["a ball", "empty", "full", "one voxel"])
def test_always_the_same_number_of_points_with_their_labels(sampling, kind: str) -> None:
    label = {
        "a ball": ball(SHAPE, 6.0, 3)[0],
        "empty": torch.zeros(1, *SHAPE),
        "full": torch.ones(1, *SHAPE, dtype=torch.uint8),
        "one voxel": torch.full((1, 1, 1, 1), 2),
    }[kind]
    points, values = RandOccupancyPoints(1001, sampling).set_random_state(0)(label)
    assert points.shape == (1001, 3)
    assert (points.dtype, values.dtype) == (torch.float32, torch.int64)
    i, j, k = points.long().unbind(1)
    assert torch.equal(label[0, i, j, k].long(), values)


def test_uniform_points_hit_every_part_alike() -> None:
    points, _ = RandOccupancyPoints(20_000, "uniform").set_random_state(0)(torch.zeros(1, *SHAPE))
    for axis, extent in enumerate(SHAPE):
        fraction = torch.bincount(points[:, axis].long(), minlength=extent) / 20_000
        assert float((fraction * extent - 1).abs().max()) < 0.25


@pytest.mark.parametrize("shape", [SHAPE, (5, 17, 9)])
@pytest.mark.parametrize("width", [1, 5, 13])
def test_the_band_is_a_dilated_gradient(shape: tuple[int, int, int], width: int) -> None:
    label = ball(shape, 4.3)[0, 0]
    torch.testing.assert_close(border_band(label, width), sobel_band(label, width))
    assert torch.equal(border_band(label.to(torch.uint8), width), border_band(label, width))


def test_the_published_recipe_for_the_liver() -> None:
    """Half of the points from the band, half uniform; of a band with fewer voxels, all."""
    label = ball((60, 50, 55), 12.0)[0]
    band = border_band(label[0])
    points, _ = RandOccupancyPoints(4000, "border").set_random_state(0)(label)
    inside = band[tuple(points.long().unbind(1))]
    assert bool(inside[:2000].all())
    expected = float(band.float().mean())
    assert abs(float(inside[2000:].float().mean()) - expected) < 0.04
    small = ball((60, 50, 55), 1.5)[0]
    voxels = border_band(small[0], 3).nonzero()
    points, _ = RandOccupancyPoints(4000, "border", band_width=3).set_random_state(0)(small)
    assert len(voxels) < 2000
    assert torch.equal(points[: len(voxels)].long(), voxels)


def test_balanced_points_are_as_many_of_every_label() -> None:
    label = ball(SHAPE, 8.0)[0]
    label[0, 20, 20:22, 20] = 4
    _, values = RandOccupancyPoints(900, "balanced").set_random_state(0)(label)
    assert counts(values, 5) == [300, 300, 0, 0, 300]


def test_the_state_decides_and_nothing_else() -> None:
    label = ball(SHAPE, 6.0)[0]
    transform = RandOccupancyPointsd("label", num_samples=500)
    first = Compose([transform]).set_random_state(3)({"label": label})
    torch.manual_seed(99)
    again = Compose([RandOccupancyPointsd("label", num_samples=500)]).set_random_state(3)({"label": label})
    assert torch.equal(first["points"], again["points"])
    other = transform({"label": label})
    assert not torch.equal(first["points"], other["points"])


def test_dictionaries_with_metadata_collate() -> None:
    """After a random flip the points are voxel indices of the flipped label; the label keeps its metadata."""
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0]))
    samples = []
    for number in range(3):
        label = MetaTensor(ball((20 + number, 18, 16), 5.0)[0].float(), affine=affine)
        pipeline = Compose(
            [EnsureTyped("label"), RandFlipd("label", 1.0, 0), RandOccupancyPointsd("label", num_samples=64)]
        ).set_random_state(number)
        sample = pipeline({"label": label})
        assert isinstance(sample["label"], MetaTensor)
        assert not isinstance(sample["points"], MetaTensor)
        i, j, k = sample["points"].long().unbind(1)
        assert torch.equal(sample["label"].as_tensor()[0, i, j, k].long(), sample["occupancy"])
        samples.append({key: sample[key] for key in ("points", "occupancy")})
    batch = list_data_collate(samples)
    assert batch["points"].shape == (3, 64, 3)
    assert batch["occupancy"].shape == (3, 64)


def test_bad_labels_are_refused_in_one_line() -> None:
    draw = RandOccupancyPoints(8)
    nan = torch.zeros(1, 4, 4, 4)
    nan[0, 1, 2, 3] = torch.nan
    for label, words in (
        (torch.zeros(2, 4, 4, 4), "argmax one-hot"),
        (torch.zeros(4, 4), r"must be \(1, H, W, D\)"),
        (torch.zeros(1, 0, 4, 4), "with voxels in it"),
        (nan, "a label needs finite values"),
        (torch.full((1, 4, 4, 4), 0.5), "mode='nearest'"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            draw(label)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": "edge"}, "must be of uniform, border, balanced, got 'edge'"),
        ({"sampling": {"border": 0.7}}, "add up to 1"),
        ({"sampling": {"border": 1.5, "uniform": -0.5}}, "at least 0"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
        ({"band_width": 4}, "band_width must be odd"),
    ],
)
def test_bad_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RandOccupancyPoints(**settings)


def test_names_that_monai_takes_for_metadata_are_refused() -> None:
    with pytest.raises(ValueError, match="takes for metadata"):
        RandOccupancyPointsd("label", points_key="label_points")
    with pytest.raises(ValueError, match="one label"):
        RandOccupancyPointsd(["label", "liver"])
    assert RandOccupancyPointsd("label", allow_missing_keys=True)({"image": 1}) == {"image": 1}

"""Listing active voxels and batching them: against plain loops, through MONAI's Compose, DataLoader and decollate."""

from __future__ import annotations

import pickle
from collections.abc import Hashable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Flipd, Invertd, RandFlipd, RandSpatialCropSamplesd, Spacingd

from monai_memeff.apps.skull import RandSkullDefectd
from monai_memeff.sparse import (
    SparseCollate,
    SparseCoordinates,
    SparseCoordinatesD,
    SparseCoordinatesd,
    SparseCoordinatesDict,
    SparseTensor,
    sparse_collate,
)

SHAPE = (5, 7, 6)
PAIR = {
    "keys": ("defective", "skull"),
    "coords_key": ("coords", "target_coords"),
    "features_key": ("features", "target_features"),
}


def volume(channels: int = 1, seed: int = 0) -> torch.Tensor:
    """(C, 5, 7, 6) with about a third of its voxels not zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(channels, *SHAPE, generator=generator) + 0.1
    return values * (torch.rand(1, *SHAPE, generator=generator) < 0.3)


def listed(image: torch.Tensor, active: Any) -> tuple[list[list[int]], list[list[float]]]:
    """Coordinates and features by three plain loops."""
    where = [list(p) for p in product(*map(range, image.shape[1:])) if active(image[(slice(None), *p)])]
    return where, [image[(slice(None), *p)].tolist() for p in where]


def sample(number: int) -> dict[str, Any]:
    """A defective and a complete skull that share a grid and have different numbers of voxels."""
    skull = MetaTensor(volume(seed=number), affine=torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0])))
    defective = skull.clone()
    defective[:, : number + 1] = 0
    return {"skull": skull, "defective": defective, "case": f"case {number}"}


# One volume


@pytest.mark.parametrize("channels", [1, 3])
def test_voxels_that_differ_from_the_background_are_active(channels: int) -> None:
    image = volume(channels)
    coordinates, features = SparseCoordinates()(image)
    where, values = listed(image, lambda v: bool((v != 0).any()))
    assert coordinates.dtype == torch.int64
    assert coordinates.tolist() == where
    assert features.tolist() == values


def test_a_threshold_and_another_background() -> None:
    image = volume(2) - 0.4
    for transform, active in (
        (SparseCoordinates(threshold=0.2), lambda v: bool((v > 0.2).any())),
        (SparseCoordinates(background=-0.4), lambda v: bool((v != np.float32(-0.4)).any())),
    ):
        coordinates, features = transform(image)
        where, values = listed(image, active)
        assert 0 < len(where) < 210
        assert (coordinates.tolist(), features.tolist()) == (where, values)


def test_one_constant_feature() -> None:
    coordinates, features = SparseCoordinates(constant=1.0)(volume(3))
    assert features.shape == (len(coordinates), 1)
    assert (features == 1).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float16, torch.float64])
def test_features_are_floating_point(dtype: torch.dtype) -> None:
    image = (volume() > 0).to(dtype)
    coordinates, features = SparseCoordinates()(image)
    assert len(coordinates) == int(image.sum())
    assert features.dtype == (dtype if dtype.is_floating_point else torch.float32)


@pytest.mark.parametrize("kind", [np.asarray, MetaTensor], ids=["numpy", "MetaTensor"])
def test_arrays_and_meta_tensors(kind: Any) -> None:
    plain = SparseCoordinates()(volume())
    for ours, theirs in zip(SparseCoordinates()(kind(volume())), plain, strict=True):
        assert not isinstance(ours, MetaTensor)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["empty", "full"])
def test_empty_and_full(value: float) -> None:
    coordinates, features = SparseCoordinates()(torch.full((2, *SHAPE), value))
    assert coordinates.shape == (210 * int(value), 3)
    assert features.shape == (210 * int(value), 2)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 1, 4, 4, 4)])
def test_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(C, H, W, D\), got .*; add a channel first"):
        SparseCoordinates()(torch.ones(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    image = volume()
    image[0, 1, 1, 1] = value
    with pytest.raises(ValueError, match="needs finite values, got 1 NaN or infinite; replace them first"):
        SparseCoordinates()(image)


# In a dictionary


def test_the_dictionary_keeps_the_volume_and_its_metadata() -> None:
    data = sample(0)
    before = data["skull"].clone()
    result = SparseCoordinatesd("skull")(data)
    assert set(result) - set(data) == {"coords", "features", "extent"}
    assert set(data) == {"skull", "defective", "case"}
    assert isinstance(result["skull"], MetaTensor)
    assert torch.equal(result["skull"], before)
    assert torch.equal(result["skull"].affine, before.affine)
    assert result["extent"].tolist() == list(SHAPE)
    expected = SparseCoordinates()(before)
    assert torch.equal(result["coords"], expected[0])
    assert torch.equal(result["features"], expected[1])


def test_two_keys_share_a_grid_and_may_be_dropped() -> None:
    result = SparseCoordinatesd(**PAIR, constant=1.0, drop=True)(sample(1))
    assert set(result) == {"case", "extent", "coords", "features", "target_coords", "target_features"}
    assert len(result["coords"]) < len(result["target_coords"])


def test_the_grids_must_agree() -> None:
    with pytest.raises(ValueError, match=r"must share one grid, got \[5, 7, 6\] and \[5, 7, 5\] \(skull\)"):
        SparseCoordinatesd(**PAIR)({"defective": volume(), "skull": volume()[..., :-1]})


def test_missing_keys() -> None:
    data = {"skull": volume()}
    with pytest.raises(KeyError, match="defective"):
        SparseCoordinatesd(**PAIR)(data)
    result = SparseCoordinatesd(**PAIR, allow_missing_keys=True, drop=True)(data)
    assert set(result) == {"extent", "target_coords", "target_features"}


def test_names_are_checked_when_built() -> None:
    with pytest.raises(ValueError, match="one coords_key and one features_key per key, got 1 and 1 for 2 keys"):
        SparseCoordinatesd(("a", "b"))
    for names in ({"coords_key": "image_coords"}, {"features_key": "image_features"}, {"extent_key": "image_extent"}):
        with pytest.raises(ValueError, match="which MONAI takes for metadata; rename it"):
            SparseCoordinatesd("image", **names)


def test_aliases_and_pickle() -> None:
    assert SparseCoordinatesD is SparseCoordinatesDict is SparseCoordinatesd
    again = pickle.loads(pickle.dumps(SparseCoordinatesd("skull", constant=1.0)))
    assert torch.equal(again(sample(0))["coords"], SparseCoordinatesd("skull")(sample(0))["coords"])


# Beside MONAI's transforms


def test_spacing_before_it_and_its_names_after_spacing() -> None:
    """The default names do not meet ``Spacingd``'s rule for names that begin with the volume's."""
    pipeline = Compose([SparseCoordinatesd("skull"), Spacingd("skull", pixdim=(1.0, 1.0, 1.0))])
    assert pipeline(sample(0))["coords"].shape[1] == 3


def test_inverting_a_pipeline_that_ends_with_it() -> None:
    pipeline = Compose([Flipd("skull", 0), Spacingd("skull", pixdim=(1.0, 1.0, 1.0)), SparseCoordinatesd("skull")])
    result = pipeline(sample(0))
    result["pred"] = result["skull"].clone()
    assert Invertd("pred", pipeline, orig_keys="skull")(result)["pred"].shape == (1, *SHAPE)
    back = pipeline.inverse(result)  # it empties the record of operations, so it comes last
    assert back["skull"].shape == (1, *SHAPE)
    torch.testing.assert_close(back["skull"].affine, sample(0)["skull"].affine)


def random_pipeline(seed: int) -> Compose:
    steps = [
        RandFlipd("skull", prob=0.5, spatial_axis=0),
        RandSkullDefectd("skull", kind="sphere", size=(0.2, 0.3), region="anywhere"),
        SparseCoordinatesd(**PAIR, constant=1.0, drop=True),
    ]
    return Compose(steps).set_random_state(seed)


def shell() -> torch.Tensor:
    """(1, 16, 18, 20): a closed shell, so that a defect fits."""
    axes = [torch.linspace(-1, 1, n) for n in (16, 18, 20)]
    radius = sum(a**2 for a in torch.meshgrid(*axes, indexing="ij")).sqrt()
    return ((radius < 0.9) & (radius > 0.6)).float()[None]


def test_the_same_seed_gives_the_same_voxels() -> None:
    first, again, other = (random_pipeline(seed)({"skull": shell()}) for seed in (3, 3, 4))
    assert torch.equal(first["coords"], again["coords"])
    assert torch.equal(first["target_coords"], again["target_coords"])
    assert not torch.equal(first["coords"], other["coords"])


# Batches


def test_collate_puts_the_batch_index_first() -> None:
    samples = [SparseCoordinatesd(**PAIR)(sample(n)) for n in (0, 2, 1)]
    batch = sparse_collate(samples)
    for coords, features in (("coords", "features"), ("target_coords", "target_features")):
        rows = [[n, *row] for n, s in enumerate(samples) for row in s[coords].tolist()]
        assert batch[coords].tolist() == rows
        assert torch.equal(batch[features], torch.cat([s[features] for s in samples]))
    assert batch["extent"].tolist() == [list(SHAPE)] * 3
    assert batch["case"] == ["case 0", "case 2", "case 1"]
    assert isinstance(batch["skull"], MetaTensor)
    assert batch["skull"].shape == (3, 1, *SHAPE)
    whole = SparseTensor(batch["features"], batch["coords"], SHAPE, batch_size=3)
    assert torch.equal(whole.dense(), batch["defective"].as_tensor())


def test_an_empty_volume_keeps_its_place_in_the_batch() -> None:
    samples = [SparseCoordinatesd("skull")({"skull": v}) for v in (volume(), torch.zeros(1, *SHAPE), volume())]
    batch = sparse_collate(samples)
    assert batch["coords"][:, 0].unique().tolist() == [0, 2]
    assert len(batch["extent"]) == 3


def test_collate_takes_lists_of_samples() -> None:
    """MONAI's crop transforms give lists; they count as samples of the batch."""
    crops = RandSpatialCropSamplesd("skull", roi_size=(4, 4, 4), num_samples=2, random_size=False)
    pipeline = Compose([crops, SparseCoordinatesd("skull")])
    batch = sparse_collate([pipeline({"skull": volume()}), pipeline({"skull": volume(seed=1)})])
    assert batch["extent"].tolist() == [[4, 4, 4]] * 4
    dense = SparseTensor(batch["features"], batch["coords"], (4, 4, 4), batch_size=4).dense()
    assert torch.equal(dense, torch.as_tensor(batch["skull"]))


def test_collate_with_other_names() -> None:
    samples = [SparseCoordinatesd("skull", "where", "what")({"skull": volume(seed=n)}) for n in range(2)]
    batch = SparseCollate("where", "what")(samples)
    assert batch["where"].shape == (len(batch["what"]), 4)
    assert "coords" not in batch


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_data_loader(workers: int) -> None:
    """Two worker processes give the batches that none gives, in order."""
    pipeline = Compose([SparseCoordinatesd(**PAIR, constant=1.0, drop=True)])
    dataset = Dataset([sample(n) for n in range(4)], pipeline)
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=SparseCollate())
    batches = list(loader)
    assert [b["case"] for b in batches] == [["case 0", "case 1"], ["case 2", "case 3"]]
    for number, batch in enumerate(batches):
        expected = sparse_collate([pipeline(sample(2 * number)), pipeline(sample(2 * number + 1))])
        assert torch.equal(batch["coords"], expected["coords"])
        assert torch.equal(batch["target_features"], expected["target_features"])


def test_a_cached_dataset_keeps_the_volume_for_the_next_epoch() -> None:
    """``drop`` takes the volume out of the sample, not out of the cache."""
    dataset = CacheDataset([{"skull": shell()}], random_pipeline(0), progress=False)
    first, second = dataset[0], dataset[0]
    assert len(first["coords"])
    assert not torch.equal(first["coords"], second["coords"])


def test_decollate_after_dense_volumes() -> None:
    """The dense part of a batch decollates as ever."""
    keys: list[Hashable] = ["skull", "defective", "case", "extent"]
    batch = sparse_collate([SparseCoordinatesd(**PAIR)(sample(n)) for n in range(2)])
    parts = decollate_batch({key: batch[key] for key in keys})
    assert [p["case"] for p in parts] == ["case 0", "case 1"]
    assert torch.equal(parts[1]["skull"].affine, sample(1)["skull"].affine)
    assert parts[0]["skull"].shape == (1, *SHAPE)

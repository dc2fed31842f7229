"""Data and the rules by which any object counts as points."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from monai_memeff.sparse.points import AddOnes, Data, FixedPoints, SphereSampling
from monai_memeff.sparse.points.data import batch_of, point_attributes, select_points, with_attributes
from tests.sparse.points.clouds import cloud


def test_attributes_of_points_and_of_the_cloud() -> None:
    data = cloud(7)
    data.affine = torch.eye(4)
    data.grid_size = torch.ones(7)  # as long as the cloud, and yet not one per point
    assert set(point_attributes(data)) == {"pos", "x", "y", "heat"}
    chosen = select_points(data, torch.tensor([4, 0]))
    assert torch.equal(chosen.heat, data.heat[[4, 0]])
    assert torch.equal(chosen.affine, torch.eye(4))
    assert len(chosen.grid_size) == 7
    assert chosen.note == "kept"
    assert chosen.batch is None
    assert len(data.pos) == len(data.heat) == 7


def test_any_object_with_pos_will_do() -> None:
    """The type is kept, the object is left as it is."""
    data = SimpleNamespace(pos=torch.zeros(3, 3), extra=torch.arange(3))
    result = AddOnes()(data)
    assert type(result) is SimpleNamespace
    assert result.ones.tolist() == [[1.0]] * 3
    assert not hasattr(data, "ones")


def test_a_list_gives_a_list() -> None:
    one, two = AddOnes()([cloud(3), cloud(5)])
    assert (len(one.ones), len(two.ones)) == (3, 5)


def test_batches() -> None:
    assert batch_of(cloud(4)).tolist() == [0, 0, 0, 0]
    data = cloud(4, clouds=2)
    data.batch = data.batch[:, None].int()
    assert batch_of(data).tolist() == [0, 1, 0, 1]
    assert batch_of(data).dtype == torch.int64


def test_ptr_follows_the_batch() -> None:
    """torch_geometric's batches keep where every cloud begins; a stale one would cut clouds in the wrong place."""
    data = cloud(6, clouds=3)
    data.batch = data.batch.sort().values
    data.ptr = torch.tensor([0, 2, 4, 6])
    kept = select_points(data, torch.tensor([0, 4, 5]))
    assert kept.ptr.tolist() == [0, 1, 1, 3]
    assert data.ptr.tolist() == [0, 2, 4, 6]
    assert with_attributes(data, {"x": None}).ptr.tolist() == [0, 2, 4, 6]


def test_clone_to_and_repr() -> None:
    data = cloud(3)
    copied = data.clone()
    copied.pos += 1
    assert not torch.equal(copied.pos, data.pos)
    assert data.to("meta").heat.device.type == "meta"
    assert data.pos.device.type == "cpu"
    assert data.num_nodes == 3
    assert "pos=[3, 3]" in repr(data)
    assert "batch" not in repr(data)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (SimpleNamespace(x=torch.zeros(3)), TypeError, "need a tensor pos of shape .*got SimpleNamespace.*use"),
        (SimpleNamespace(pos=[[0, 0, 0]]), TypeError, "with pos of list"),
        (Data(torch.zeros(3, 2)), ValueError, r"floating point \(N, 3\), got torch.float32 of \(3, 2\)"),
        (Data(torch.zeros(3, 3).long()), ValueError, "got torch.int64"),
        (SimpleNamespace(pos=torch.zeros(1, 3), edge_index=torch.zeros(2, 0)), ValueError, "edge_index; remove them"),
    ],
)
def test_what_is_no_set_of_points_is_refused(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AddOnes()(data)


def test_through_monais_compose() -> None:
    """The transforms are MONAI's: Compose seeds them, and a cloud is one item."""
    from monai.transforms import Compose

    pipeline = Compose([SphereSampling(8.0, (0, 0, 0)), FixedPoints(5, replace=False), AddOnes()])
    first = pipeline.set_random_state(3)(cloud())
    again = pipeline.set_random_state(3)(cloud())
    other = pipeline.set_random_state(4)(cloud())
    assert torch.equal(first.pos, again.pos)
    assert not torch.equal(first.pos, other.pos)
    assert first.ones.shape == (5, 1)


@pytest.mark.slow
def test_torch_geometrics_class_comes_back() -> None:
    geometric = pytest.importorskip("torch_geometric.data", reason="torch_geometric is optional")
    data = geometric.Data(pos=torch.randn(9, 3), y=torch.arange(9))
    result = FixedPoints(4)(data)
    assert type(result) is geometric.Data
    assert result.num_nodes == 4
    assert data.num_nodes == 9
    batch = geometric.Batch.from_data_list([data, data])
    kept = select_points(batch, batch.y < 3)
    assert kept.ptr.tolist() == [0, 3, 6]
    assert type(kept) is type(batch)

"""GridSampling3D against dictionaries of cells."""

from __future__ import annotations

import pytest
import torch

from monai_memeff.sparse.points import Data, GridSampling3D
from monai_memeff.sparse.points.grid_sampling import most_frequent
from tests.sparse.points.clouds import cloud, majority, members


@pytest.mark.parametrize("clouds", [1, 3])
@pytest.mark.parametrize("size", [0.9, 3.0, 100.0])
def test_means_and_majorities(size: float, clouds: int) -> None:
    data = cloud(clouds=clouds)
    data.flag = data.heat > 0.5
    result = GridSampling3D(size, quantize_coords=True)(data)
    cells = members(data, size)
    assert result.coords.dtype == torch.int32
    assert result.coords.tolist() == [list(cell[1:]) for cell in cells]
    assert bool((result.coords < 0).any()) is (size < 100)
    for name in ("pos", "x", "heat"):
        mean = torch.stack([getattr(data, name)[rows].mean(0) for rows in cells.values()])
        torch.testing.assert_close(getattr(result, name), mean)
    for name in ("y", "flag"):
        values = getattr(data, name)
        assert getattr(result, name).tolist() == [majority(values[rows]) for rows in cells.values()]
        assert getattr(result, name).dtype == values.dtype
    assert result.grid_size.tolist() == [size]
    assert result.note == "kept"
    if clouds > 1:
        assert result.batch.tolist() == [cell[0] for cell in cells]
    assert len(data.pos) == 60
    assert not hasattr(data, "grid_size")


def test_attributes_without_a_vote_come_from_one_point() -> None:
    data = cloud()
    data.origin_id = torch.arange(60)
    data.pair = torch.stack((torch.arange(60), torch.arange(60) * 7), dim=1)
    result = GridSampling3D(4.0)(data)
    for row, rows in enumerate(members(data, 4.0).values()):
        assert int(result.origin_id[row]) in rows
        assert result.pair[row].tolist() == [int(result.origin_id[row]), 7 * int(result.origin_id[row])]
    assert not hasattr(result, "coords")


def test_last_keeps_one_whole_point_of_every_cell() -> None:
    data = cloud()
    data.origin_id = torch.arange(60)
    sample = GridSampling3D(4.0, quantize_coords=True, mode="last").set_random_state(0)
    cells = list(members(data, 4.0).values())
    drawn = set()
    for _ in range(20):
        result = sample(data)
        assert all(int(row) in rows for row, rows in zip(result.origin_id, cells, strict=True))
        for name in ("pos", "x", "y", "heat"):
            assert torch.equal(getattr(result, name), getattr(data, name)[result.origin_id])
        assert torch.equal(result.coords.double(), (result.pos / 4.0).round())
        drawn |= set(result.origin_id.tolist())
    assert drawn == set(range(60)), "every point has its chance"
    again = [GridSampling3D(4.0, mode="last").set_random_state(5)(data).origin_id for _ in range(2)]
    assert torch.equal(*again)


def test_gradients_pass_through_the_mean() -> None:
    data = cloud(12)
    features = data.x.clone().requires_grad_()

    def averaged(x: torch.Tensor) -> torch.Tensor:
        return GridSampling3D(5.0)(Data(data.pos, x)).x

    assert torch.autograd.gradcheck(averaged, features)


def test_most_frequent_by_counting() -> None:
    labels, cell = torch.randint(-3, 4, (200,)), torch.cat((torch.arange(9), torch.randint(0, 9, (191,))))
    expected = [majority(labels[cell == c]) for c in range(9)]
    assert most_frequent(labels, cell, 9).tolist() == expected
    assert most_frequent(torch.tensor([5, 2, 2, 5]), torch.zeros(4, dtype=torch.long), 1).tolist() == [2]


@pytest.mark.parametrize("mode", ["mean", "last"])
def test_empty_and_single(mode: str) -> None:
    empty = GridSampling3D(2.0, quantize_coords=True, mode=mode)(Data(torch.zeros(0, 3), y=torch.zeros(0).long()))
    assert empty.pos.shape == empty.coords.shape == (0, 3)
    assert empty.y.shape == (0,)
    single = GridSampling3D(2.0, quantize_coords=True, mode=mode)(Data(torch.tensor([[-5.0, 0.9, 3.1]])))
    assert single.coords.tolist() == [[-2, 0, 2]]


def test_bad_input_is_refused() -> None:
    for size in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"size must be a (positive|finite) number"):
            GridSampling3D(size)
    with pytest.raises(ValueError, match="mode must be one of mean, last, got 'max'"):
        GridSampling3D(1.0, mode="max")
    with pytest.raises(ValueError, match="pos needs finite values, got 1 NaN or infinite"):
        GridSampling3D(1.0)(Data(torch.tensor([[0.0, float("nan"), 0.0]])))
    with pytest.raises(ValueError, match=r"span .* cells of 0.1, and at most 262144 per axis.*larger size"):
        GridSampling3D(0.1)(Data(torch.tensor([[0.0, 0, 0], [1e5, 0, 0]])))

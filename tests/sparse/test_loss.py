"""The completion loss against binary cross-entropy written out, and its targets against sets in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from monai_memeff.sparse import SparseCompletionLoss, SparseTensor
from monai_memeff.sparse.core.tensor import nonzero_voxels
from tests.sparse.reference import floored, random_mask, set_of

SHAPE = (9, 6, 7)


def logits_at(stride: int, occupancy: float = 0.5, dtype: torch.dtype = torch.float64) -> SparseTensor:
    """Random candidates with random logits on the grid of SHAPE coarsened by a stride."""
    shape = tuple(-(-extent // stride) for extent in SHAPE)
    mask = random_mask(2, shape, occupancy)
    x = SparseTensor.from_dense(torch.randn(2, 1, *shape, dtype=dtype) * 3, mask)
    return SparseTensor(x.features, x.coordinates, shape, stride, batch_size=2)


def by_hand(levels: list[SparseTensor], target: Tensor) -> float:
    """Sum over levels of the mean of -log sigmoid(z) for wanted candidates and -log(1 - sigmoid(z)) for others."""
    total, complete = 0.0, set_of(nonzero_voxels(target))
    for level in levels:
        wanted = floored(complete, level.stride[0])
        terms = [
            math.log1p(math.exp(-z if tuple(place) in wanted else z))
            for place, z in zip(level.coordinates.tolist(), level.features[:, 0].tolist(), strict=True)
        ]
        total += sum(terms) / max(len(terms), 1)
    return total


@pytest.mark.parametrize("occupancy", [0.0, 0.2, 1.0])
def test_sum_of_means_over_levels(occupancy: float) -> None:
    target = random_mask(2, SHAPE, occupancy).float()
    levels = [logits_at(4), logits_at(2), logits_at(1, 0.1)]
    loss = SparseCompletionLoss()
    assert loss(levels, target).item() == pytest.approx(by_hand(levels, target), rel=1e-12)
    assert loss(levels[::-1], nonzero_voxels(target)).item() == pytest.approx(loss(levels, target).item(), rel=1e-12)


def test_a_level_without_candidates_adds_zero() -> None:
    target, level = random_mask(2, SHAPE, 0.3).float(), logits_at(2)
    nothing = level.prune(torch.zeros(len(level), dtype=torch.bool))
    loss = SparseCompletionLoss()
    assert torch.equal(loss([level, nothing], target), loss([level], target))
    assert loss([nothing], target).item() == 0.0


def test_gradients() -> None:
    target, level = random_mask(2, SHAPE, 0.3).float(), logits_at(2)
    features = level.features.requires_grad_()
    SparseCompletionLoss()([level], target).backward()
    wanted = floored(set_of(nonzero_voxels(target)), 2)
    truth = torch.tensor([[float(tuple(place) in wanted)] for place in level.coordinates.tolist()]).double()
    torch.testing.assert_close(features.grad, (features.sigmoid() - truth) / len(level))


def test_half_precision_logits_give_a_float32_loss() -> None:
    target, level = random_mask(2, SHAPE, 0.3).float(), logits_at(2).to(dtype=torch.bfloat16)
    value = SparseCompletionLoss()([level], target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(by_hand([level], target), rel=1e-5)


def test_foreign_grids_are_refused() -> None:
    loss, level = SparseCompletionLoss(), logits_at(2)
    with pytest.raises(ValueError, match=r"at stride \(2, 2, 2\) .*must be \(2, \(5, 3, 4\)\), got \(1, "):
        loss([level], random_mask(1, SHAPE, 0.3).float())
    with pytest.raises(ValueError, match=r"got \(2, \(5, 3, 6\)\)"):
        loss([level], random_mask(2, (9, 6, 12), 0.3).float())
    with pytest.raises(ValueError, match="at least one level of logits, got none"):
        loss([], random_mask(2, SHAPE, 0.3).float())


def test_the_focusing_parameter_weights_the_hard_candidates() -> None:
    """Gamma 0 is the published loss; a larger one is the focal loss by its formula."""
    logits = SparseTensor(torch.randn(6, 1, dtype=torch.float64), _line(6), (6, 1, 1))
    target = SparseTensor(torch.ones(3, 1, dtype=torch.float64), _line(3), (6, 1, 1))
    value = logits.features[:, 0].sigmoid()
    right = torch.cat([value[:3], 1 - value[3:]])
    for gamma in (0.0, 0.5, 2.0):
        found = SparseCompletionLoss(gamma=gamma)([logits], target)
        torch.testing.assert_close(found, (-right.log() * (1 - right) ** gamma).mean())
    with pytest.raises(ValueError, match="gamma"):
        SparseCompletionLoss(gamma=-1)


def _line(count: int) -> Tensor:
    coordinates = torch.zeros(count, 4, dtype=torch.long)
    coordinates[:, 1] = torch.arange(count)
    return coordinates

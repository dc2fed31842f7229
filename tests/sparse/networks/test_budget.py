"""Voxel budgets: inputs that are too large are refused, levels that explode are cut by logit, item by item."""

from __future__ import annotations

import warnings

import pytest
import torch

from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet, SparseTensor
from monai_memeff.sparse.core.voxel_set import VoxelSet
from monai_memeff.sparse.networks.budget import prune_to_budget
from tests.sparse.networks.test_completion_and_unet import SMALL, shell
from tests.sparse.reference import set_of

ODD = (37, 70, 41)


def eager(channels: tuple[int, ...] = SMALL, **options: object) -> SparseCompletionNet:
    """A network that wants to keep every candidate."""
    torch.manual_seed(4)
    net = SparseCompletionNet(channels, **options)
    for head in net.heads:
        torch.nn.init.constant_(head.bias, 5.0)
    return net


def test_the_best_go_on_and_ties_go_to_the_first() -> None:
    x = SparseTensor(torch.zeros(6, 1), torch.tensor([[0, 0, 0, k] for k in range(6)]), (1, 1, 6))
    none = VoxelSet(torch.zeros(0, dtype=torch.int64), (2, 2, 12), 1)
    keep = torch.tensor([True, True, False, True, True, True])
    rank = torch.tensor([1.0, 3.0, 9.0, 2.0, 2.0, torch.inf])
    with pytest.warns(UserWarning, match=r"stride 1 .* refined to 40 .*, max_voxels = 24 .* the 3 of 5 .* Raise"):
        assert prune_to_budget(keep, rank, x.voxels, none, 24).tolist() == [False, True, False, True, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prune_to_budget(keep, rank, x.voxels, none, 40).equal(keep)
        assert prune_to_budget(keep, rank, x.voxels, none, None) is keep


def test_every_item_has_its_own_budget() -> None:
    coordinates = torch.tensor([[0, 0, 0, 0], *([2, 0, 0, k] for k in range(4))])
    x = SparseTensor(torch.zeros(5, 1), coordinates, (1, 1, 4), batch_size=3)
    none = VoxelSet(torch.zeros(0, dtype=torch.int64), (2, 2, 8), 3)
    with pytest.warns(UserWarning, match="the 2 of 4"):
        kept = prune_to_budget(torch.ones(5, dtype=torch.bool), torch.arange(5.0), x.voxels, none, 16)
    assert kept.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("training", [True, False])
def test_no_level_has_more_candidates_than_allowed(training: bool) -> None:
    volume, budget = shell(ODD, items=2), 16000
    net = eager(max_voxels=budget).train(training)
    free = eager().train(training)
    sizes = {}
    for name, network in (("cut", net), ("free", free)):
        levels = []
        hooks = [
            head.register_forward_hook(lambda _m, x, _y, levels=levels: levels.append(x[0])) for head in network.heads
        ]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network(volume, volume)
        for hook in hooks:
            hook.remove()
        sizes[name] = [max(torch.bincount(level.coordinates[:, 0]).tolist()) for level in levels]
    assert max(sizes["free"]) > 2 * budget
    assert max(sizes["cut"]) <= budget


def test_training_prefers_the_target_and_goes_on() -> None:
    target = shell(ODD)
    wanted = int(torch.nn.functional.max_pool3d(target, 2, ceil_mode=True).count_nonzero())
    net = eager(max_voxels=8 * wanted)
    with pytest.warns(UserWarning, match="with the largest logits go on"):
        levels = net(shell(ODD, bite=True), target)
    SparseCompletionLoss()(levels, target).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    missing = {tuple(place) for place in target.nonzero()[:, [0, 2, 3, 4]].tolist()} - set_of(levels[-1])
    assert not missing


def test_inputs_above_the_budget_are_refused() -> None:
    volume = shell(ODD)
    with pytest.raises(ValueError, match=r"max_voxels = 100 voxels, got \d+; raise max_voxels, crop"):
        SparseCompletionNet(SMALL, max_voxels=100).eval()(volume)
    with pytest.raises(ValueError, match=r"max_voxels must be a whole number of at least 64.*got 10"):
        SparseCompletionNet(SMALL, max_voxels=10)

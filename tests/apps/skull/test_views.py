"""Averages over views equal those taken one by one, wherever the volume ends and whatever is mirrored."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_memeff.apps.skull import ViewAveragingInferer
from monai_memeff.apps.skull.views import spread
from monai_memeff.errors import InputError
from monai_memeff.sparse import SparseCompletionNet, SparseInferer
from tests.oracles import asymmetric, fill_asymmetric


def network() -> nn.Module:
    """Two logits for every voxel from its neighbors, edges included."""
    return fill_asymmetric(nn.Conv3d(1, 2, 3, padding=1)).double().eval()


def one_by_one(x: Tensor, net: nn.Module, views: int, shift: int, axis: int | None) -> Tensor:
    """Mean probability, a voxel's sum over the views that hold it."""
    total, count = torch.zeros(x.shape[0], 2, *x.shape[2:]), torch.zeros(x.shape[2:])
    both = 1 if axis is None else 2
    for number in range(views):
        steps = [start - shift for start in spread(shift)[number // both]]
        view = torch.zeros_like(x)
        for place in itertools.product(*(range(n) for n in x.shape[2:])):
            source = [p + s for p, s in zip(place, steps, strict=True)]
            if all(0 <= p < n for p, n in zip(source, x.shape[2:], strict=True)):
                view[(..., *place)] = x[(..., *source)]
        flip = [2 + axis] if axis is not None and number % 2 else []
        found = net(view.flip(flip)).sigmoid().flip(flip).float()
        for place in itertools.product(*(range(n) for n in x.shape[2:])):
            target = [p + s for p, s in zip(place, steps, strict=True)]
            if all(0 <= p < n for p, n in zip(target, x.shape[2:], strict=True)):
                total[(..., *target)] += found[(..., *place)]
                count[tuple(target)] += 1
    return total / count


@torch.no_grad()
@pytest.mark.parametrize(("views", "shift", "axis"), [(1, 2, 0), (2, 0, 2), (7, 1, 1), (5, 2, None), (16, 2, 0)])
@pytest.mark.slow
def test_the_mean_over_views(views: int, shift: int, axis: int | None) -> None:
    x, net = asymmetric((2, 1, 5, 4, 6)), network()
    found = ViewAveragingInferer(views=views, shift=shift, mirror_axis=axis, level=0.4)(x, net)
    expected = one_by_one(x, net, views, shift, axis)
    torch.testing.assert_close(found.sigmoid(), torch.sigmoid(torch.logit(expected) - torch.logit(torch.tensor(0.4))))
    assert torch.equal(found > 0, expected > 0.4)


@torch.no_grad()
def test_a_sparse_network_and_what_comes_back() -> None:
    net = fill_asymmetric(SparseCompletionNet((2,) * 7)).eval()
    mask = (asymmetric((1, 1, 16, 16, 16)).float() > 0.2).float()
    x = MetaTensor(mask, affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    found = ViewAveragingInferer(SparseInferer(), views=1)(x, net)
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, x.affine)
    assert torch.equal(found.as_subclass(Tensor) > 0, SparseInferer()(mask, net) > 0)
    many, again = (ViewAveragingInferer(SparseInferer(), views=6)(mask, net) for _ in range(2))
    assert torch.equal(many, again)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_every_shift_comes_once_and_no_shift_first(shift: int) -> None:
    found = spread(shift)
    assert found[0] == (shift,) * 3
    assert sorted(found) == list(itertools.product(range(2 * shift + 1), repeat=3))


def test_what_is_refused() -> None:
    for wrong in ({"views": 0}, {"views": 55, "shift": 1}, {"views": 2, "shift": 0, "mirror_axis": None}):
        with pytest.raises(ValueError, match=r"views must be 1 \.\.\. \d+"):
            ViewAveragingInferer(**wrong)
    with pytest.raises(ValueError, match="level"):
        ViewAveragingInferer(level=1.0)
    with pytest.raises(ValueError, match="mirror_axis"):
        ViewAveragingInferer(mirror_axis=3)
    with pytest.raises(InputError, match=r"volumes \(B, C, H, W, D\)"):
        ViewAveragingInferer()(torch.rand(1, 1, 4, 4), network())
    with pytest.raises(InputError, match="gave logits of"):
        ViewAveragingInferer()(torch.rand(1, 1, 4, 4, 4), nn.Conv3d(1, 1, 3))
    with pytest.raises(InputError, match="NaN"):
        ViewAveragingInferer()(torch.full((1, 1, 4, 4, 4), torch.nan), nn.Identity())

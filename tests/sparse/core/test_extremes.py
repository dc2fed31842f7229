"""The largest and the smallest: ten million voxels, one voxel; what would overflow is refused before work starts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet, SparseConv3d, SparseTensor
from monai_memeff.sparse.core import neighbors as neighbors

MOST = 2**18


@pytest.mark.exhaustive
def test_ten_million_voxels_with_gradients() -> None:
    """A full grid of 10,077,696 voxels against torch's convolution."""
    volume = torch.randn(1, 1, 216, 216, 216)
    layer = SparseConv3d(1, 1)
    keys = torch.arange(volume.numel())
    x = SparseTensor.from_dense(volume, torch.ones_like(volume, dtype=torch.bool))
    assert torch.equal(x.voxels.keys, keys)
    expected = functional.conv3d(volume, layer.weight, layer.bias, padding=1)
    ours = layer(x)
    assert len(ours) == 10_077_696
    torch.testing.assert_close(ours.features.view(expected.shape), expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * cotangent).mean(), list(layer.parameters()))
    mine = torch.autograd.grad((ours.features.view(expected.shape) * cotangent).mean(), list(layer.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("place", [(0, 0, 0), (MOST - 1, 5, 70)])
def test_one_voxel_in_a_grid_of_the_largest_extent(place: tuple[int, int, int]) -> None:
    x = SparseTensor(torch.ones(1, 1), torch.tensor([[0, *place]]), (MOST, 64, 128))
    net, loss = SparseCompletionNet(), SparseCompletionLoss()
    for head in net.heads:
        torch.nn.init.constant_(head.bias, -3.0)
    levels = net(x, x)
    loss(levels, x).backward()
    assert [len(level) > 0 for level in levels] == [True] * 6
    assert tuple(levels[-1].coordinates[:, 1:].amax(0).tolist()) < (MOST, MOST, MOST)
    assert torch.isfinite(net.eval()(x).features).all()


def test_more_voxels_than_rows_can_be_numbered_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "MAX_SLOTS", 100)
    x = SparseTensor.from_dense(torch.ones(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 4, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"at most 33 voxels with a kernel of \(3, 3, 3\), got 64; use a smaller batch"
    ):
        SparseConv3d(1, 1)(x)
    assert len(SparseConv3d(1, 1, 2, 2)(x)) == 8  # no zeros between rows, so a hundred are allowed


def test_extents_beyond_the_largest_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 262144"):
        SparseTensor(torch.ones(1, 1), torch.zeros(1, 4, dtype=torch.int64), (MOST + 1, 1, 1))
    with pytest.raises(ValueError, match=r"coordinate i must lie in 0 \.\.\. 7, got 8"):
        SparseTensor(torch.ones(1, 1), torch.tensor([[0, 8, 0, 0]]), (8, 8, 8))

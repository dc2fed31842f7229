"""Bounds are bounds: whatever has a maximum is measured against it, on inputs that want more."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monai_memeff.occupancy import OccupancyNet, OctreeInferer
from monai_memeff.sparse import CoarseToSparseUNet, SparseCompletionNet, SparseTensor, keep_kernel_maps
from monai_memeff.sparse.core import map_cache

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:monai_memeff")

QUICK = settings(max_examples=25)


def candidates(net: SparseCompletionNet, volume: Tensor, target: Tensor) -> list[int]:
    """The largest number of candidates of a volume at every level."""
    levels: list[SparseTensor] = []
    hooks = [head.register_forward_pre_hook(lambda _, x: levels.append(x[0])) for head in net.heads]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net(volume, target)
    for hook in hooks:
        hook.remove()
    return [max(b - a for a, b in pairwise(level.voxels.batch_bounds())) for level in levels]


@QUICK
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    fill=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    bias=st.sampled_from([-1.0, 0.0, 5.0]),
    training=st.booleans(),
    room=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_no_level_of_the_completion_network_has_more_candidates_than_max_voxels(
    shape: tuple[int, int, int], fill: float, bias: float, training: bool, room: float, seed: int
) -> None:
    torch.manual_seed(seed)
    volume, target = ((torch.rand(2, 1, *shape) < share).float() for share in (fill, max(fill, 0.1)))
    present, cells = int(volume.flatten(1).sum(1).max()), shape[0] * shape[1] * shape[2]
    budget = max(64, present + int(room * (cells - present)))
    net = SparseCompletionNet((2,) * 7, max_voxels=budget).train(training)
    for head in net.heads:
        torch.nn.init.constant_(head.bias, bias)
    assert max(candidates(net, volume, target)) <= budget


def test_the_example_of_a_shell_stays_within_its_budget_and_the_budget_is_used() -> None:
    volume = torch.zeros(1, 1, 40, 40, 40)
    volume[..., 4:36, 4:36, 4:36] = 1
    volume[..., 6:34, 6:34, 6:34] = 0
    net = SparseCompletionNet((2,) * 7, max_voxels=13924).eval()
    for head in net.heads:
        torch.nn.init.constant_(head.bias, 5.0)
    most = max(candidates(net, volume, volume))
    assert 13000 < most <= 13924


def test_a_first_level_beyond_the_budget_is_refused() -> None:
    places = 64 * torch.cartesian_prod(*[torch.arange(4)] * 3)
    volume = SparseTensor(torch.ones(64, 1), torch.nn.functional.pad(places, (1, 0)), (256, 256, 256))
    with pytest.raises(ValueError, match=r"first level, a volume has 512 candidates, max_voxels = 64 are allow"):
        SparseCompletionNet((1,) * 7, max_voxels=64).eval()(volume)


@QUICK
@given(
    shape=st.tuples(*[st.integers(1, 17)] * 3),
    factor=st.tuples(*[st.integers(1, 4)] * 3),
    max_active=st.floats(0.001, 1),
    dilation=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_the_sparse_stage_sees_at_most_max_active_of_the_voxels(
    shape: tuple[int, int, int], factor: tuple[int, int, int], max_active: float, dilation: int, seed: int
) -> None:
    torch.manual_seed(seed)
    net = CoarseToSparseUNet(
        3, 1, 2, (2, 4), (2,), coarse_factor=factor, refine_channels=(2, 4), refine_strides=(2,), context_channels=1,
        max_active=max_active, dilation=dilation, certainty=1.0,
    )  # fmt: skip
    seen: list[SparseTensor] = []
    net.refine.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        assert net(torch.randn(2, 1, *shape)).shape == (2, 2, *shape)
    for first, last in pairwise(seen[0].voxels.batch_bounds()):
        assert last - first <= max_active * shape[0] * shape[1] * shape[2]


@settings(QUICK, max_examples=15)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    batch=st.integers(1, 3),
    points_per_pass=st.integers(1, 100),
    octree=st.booleans(),
    graph=st.booleans(),
)
def test_no_pass_of_an_occupancy_network_answers_more_points_than_allowed(
    shape: tuple[int, int, int], batch: int, points_per_pass: int, octree: bool, graph: bool
) -> None:
    torch.manual_seed(0)
    net = OccupancyNet(1, 2, None, (2,), "interpolated", width=4, blocks=1, points_per_pass=points_per_pass).eval()
    asked: list[int] = []
    net.decoder.register_forward_pre_hook(lambda _, x: asked.append(x[0].shape[0] * x[0].shape[1]))
    volume = torch.randn(batch, 1, *shape)
    with torch.set_grad_enabled(graph):
        dense = net(volume) if not octree else OctreeInferer(points_per_pass, compare_dense=True)(volume, net)
    assert dense.shape == (batch, 2, *shape)
    assert max(asked) <= points_per_pass
    if not octree:
        assert sum(asked) == batch * shape[0] * shape[1] * shape[2]


@pytest.mark.slow
def test_the_folder_of_kernel_maps_does_not_outgrow_its_bound(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(map_cache, "MIN_VOXELS", 1)
    bound = 60_000
    keep_kernel_maps(tmp_path, max_bytes=bound)
    try:
        for seed in range(12):
            torch.manual_seed(seed)
            mask = torch.rand(1, 1, 9, 10, 11) < 0.5
            from_dense = SparseTensor.from_dense(mask.float(), mask)
            SparseCompletionNet((1,) * 7).eval()(from_dense)
    finally:
        keep_kernel_maps(None)
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert sizes
    assert sum(sizes) <= bound

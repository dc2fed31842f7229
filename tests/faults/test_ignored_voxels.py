"""Voxels without annotation teach nothing: not as points, not in coarse cells, not as candidates, in no trainer."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss
from torch import Tensor

from monai_memeff.halo import SpatialLoss
from monai_memeff.halo.run.ranks.comm.mesh import single_rank_mesh
from monai_memeff.occupancy import (
    OccupancyLoss,
    OccupancyNet,
    PrepareBatchOccupancy,
    RandOccupancyPoints,
    SampledDiceMetric,
)
from monai_memeff.occupancy.sampling import border_band
from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet, SparseTensor

QUICK = settings(max_examples=40)
SHAPE = (6, 7, 9)
IGNORED = 7


def labels_of(draw: Any, shape: tuple[int, ...], classes: int, batch: int = 2) -> Tensor:
    """Labels (B, 1, H, W, D) with a box of ignored voxels in every item, of any size from none to the whole."""
    torch.manual_seed(draw(st.integers(0, 999)))
    label = torch.randint(0, classes, (batch, 1, *shape))
    for item in label:
        box = [slice(*sorted(draw(st.tuples(*[st.integers(0, extent)] * 2)))) for extent in shape]
        item[(0, *box)] = IGNORED
    if draw(st.booleans()):
        label[0] = IGNORED
    return label


# Occupancy


@QUICK
@given(data=st.data(), channels=st.integers(1, 3), own=st.booleans(), grid=st.tuples(*[st.integers(1, 9)] * 3))
def test_ignored_points_and_cells_have_no_gradient_and_do_not_change_the_loss(
    data: st.DataObject, channels: int, own: bool, grid: tuple[int, int, int]
) -> None:
    label = labels_of(data.draw, SHAPE, max(channels, 2))
    point_loss = DiceCELoss(to_onehot_y=channels > 1, softmax=channels > 1, sigmoid=channels == 1)
    loss = OccupancyLoss(None if own else point_loss, ignore_index=IGNORED)
    batch = {"image": torch.zeros(2, 1, *SHAPE), "label": label}
    _, (values, volume), (points,), _ = PrepareBatchOccupancy(num_samples=50, ignore_index=IGNORED)(batch)
    logits = torch.randn(2, 50, channels, requires_grad=True)
    coarse = torch.randn(2, channels, *grid, requires_grad=True)
    value = loss((logits, coarse), (values, volume))
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert coarse.grad is not None
    i, j, k = points.long().unbind(-1)
    assert torch.equal(values, torch.stack([item[0][a, b, c] for item, a, b, c in zip(label, i, j, k, strict=True)]))
    judged_points, judged_cells = values != IGNORED, torch.ones(2, *grid, dtype=torch.bool)
    windows = [
        [(n * extent // size, -(-(n + 1) * extent // size)) for n in range(size)]
        for size, extent in zip(grid, SHAPE, strict=True)
    ]
    for cell in itertools.product(*map(range, grid)):
        box = [slice(*along[n]) for along, n in zip(windows, cell, strict=True)]
        inside = label[(slice(None), 0, *box)].flatten(1)
        judged_cells[(slice(None), *cell)] = ((inside != 0) & (inside != IGNORED)).any(1) | (inside != IGNORED).all(1)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, judged_points)
    assert torch.equal(coarse.grad.abs().sum(1) > 0, judged_cells)
    with torch.no_grad():
        logits[~judged_points] += 9
        coarse.movedim(1, -1)[~judged_cells] -= 9
    assert torch.equal(loss((logits, coarse), (values, volume)), value)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_volume_that_is_ignored_everywhere_has_no_loss_and_moves_nothing(channels: int) -> None:
    net = OccupancyNet(1, channels, None, (4, 8), "interpolated", width=8, blocks=1)
    label = torch.full((2, 1, 8, 8, 8), IGNORED)
    batch = {"image": torch.randn(2, 1, 8, 8, 8), "label": label}
    image, target, (points,), _ = PrepareBatchOccupancy(num_samples=20, ignore_index=IGNORED)(batch)
    for loss in (OccupancyLoss(ignore_index=IGNORED), OccupancyLoss(DiceCELoss(sigmoid=True), ignore_index=IGNORED)):
        value = loss(net(image, points), target)
        value.backward()
        assert value == 0
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_without_an_ignored_voxel_the_loss_is_what_it_was() -> None:
    label = torch.randint(0, 3, (2, 1, *SHAPE))
    values, logits, coarse = torch.randint(0, 3, (2, 30)), torch.randn(2, 30, 3), torch.randn(2, 3, 2, 2, 3)
    plain = OccupancyLoss()((logits, coarse), (values, label))
    assert torch.equal(OccupancyLoss(ignore_index=IGNORED)((logits, coarse), (values, label)), plain)


def test_points_drawn_elsewhere_that_are_ignored_are_left_out_or_refused() -> None:
    values = torch.tensor([[0, 1, IGNORED, 1]])
    logits, label = torch.randn(1, 4, 2), torch.zeros(1, 1, 2, 2, 2)
    kept = values[0] != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[0, kept], values[0, kept])
    torch.testing.assert_close(OccupancyLoss(ignore_index=IGNORED)((logits, None), (values, label)), expected)
    foreign = OccupancyLoss(DiceCELoss(to_onehot_y=True, softmax=True), ignore_index=IGNORED)
    with pytest.raises(ValueError, match=r"1 points lie in .* the ignored label 7.*draw points with"):
        foreign((logits, None), (values, label))


@pytest.mark.parametrize("sampling", ["uniform", "border", "balanced"])
def test_points_are_drawn_of_annotated_voxels_only(sampling: str) -> None:
    label = torch.randint(0, 3, (1, *SHAPE))
    label[:, :3] = IGNORED
    _, values = RandOccupancyPoints(500, sampling, 3, ignore_index=IGNORED).set_random_state(0)(label)
    assert set(values.tolist()) == {0, 1, 2}
    _, values = RandOccupancyPoints(9, sampling, ignore_index=IGNORED)(torch.full((1, *SHAPE), IGNORED))
    assert values.tolist() == [IGNORED] * 9


def test_the_edge_of_the_annotation_is_no_border_of_a_structure() -> None:
    label = torch.zeros(9, 9, 30, dtype=torch.uint8)
    label[..., 20:] = 1
    whole = border_band(label, 3)
    label[..., :6] = 255
    assert torch.equal(border_band(label, 3, 255), whole)
    label[..., 18:22] = 255  # a border that nobody drew
    assert not border_band(label, 1, 255).any()


def test_the_sampled_dice_does_not_score_ignored_voxels() -> None:
    truth = torch.zeros(1, 1, *SHAPE)
    truth[..., :4] = 1
    truth[:, :, :3] = IGNORED
    guess = torch.where(truth == IGNORED, 1 - (truth == 1).float(), truth)
    assert SampledDiceMetric(2000, ignore_index=IGNORED)(guess, truth).tolist() == [[1.0]]
    assert SampledDiceMetric(2000, ignore_index=IGNORED)(guess, torch.full_like(truth, IGNORED)).isnan().all()


# Completion


@QUICK
@given(data=st.data(), sparse=st.booleans())
def test_candidates_of_cells_without_annotation_have_no_gradient(data: st.DataObject, sparse: bool) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    target = labels_of(data.draw, shape, 2)
    levels, judged = [], []
    for stride in (1, 2, 4, 8):
        grid = [-(-extent // stride) for extent in shape]
        rows = torch.ones(2, 1, *grid, dtype=torch.bool)
        level = SparseTensor.from_dense(torch.randn(2, 1, *grid), rows)
        level.voxels.stride = (stride,) * 3
        level.features.requires_grad_()
        levels.append(level)
        missing = [n for extent in shape[::-1] for n in (0, -extent % stride)]
        known, doubtful = ((target != 0) & (target != IGNORED), target == IGNORED)
        filled, unknown = (
            torch.nn.functional.max_pool3d(torch.nn.functional.pad(mask.float(), missing), stride).flatten() > 0
            for mask in (known, doubtful)
        )
        judged.append(filled | ~unknown)
    given_target = SparseTensor.from_dense(target.float(), target != 0) if sparse else target
    loss = SparseCompletionLoss(IGNORED)(levels, given_target)
    loss.backward()
    assert loss.isfinite()
    for level, expected in zip(levels, judged, strict=True):
        assert torch.equal(level.features.grad[:, 0] != 0, expected)
    structure = torch.where(target == IGNORED, 0, target)
    if bool((target != IGNORED).all()):
        assert torch.equal(loss, SparseCompletionLoss()(levels, structure))


def test_the_completion_network_does_not_take_ignored_voxels_for_structure() -> None:
    volume = (torch.rand(1, 1, 12, 12, 12) < 0.2).float()
    target = volume.clone()
    target[..., 6:] = IGNORED
    net, plain = SparseCompletionNet((2,) * 7, ignore_index=IGNORED), SparseCompletionNet((2,) * 7)
    plain.load_state_dict(net.state_dict())
    found, expected = net(volume, target), plain(volume, torch.where(target == IGNORED, 0, target))
    assert all(torch.equal(a.features, b.features) for a, b in zip(found, expected, strict=True))
    for network_or_loss in (SparseCompletionNet, SparseCompletionLoss):
        with pytest.raises(ValueError, match="ignore_index must not be 0"):
            network_or_loss(ignore_index=0)


# nnU-Net's trainers


def loss_of(trainer: type, regions: bool) -> Any:
    """The trainer's loss, without a dataset: (loss, points' loss or None)."""
    self = object.__new__(trainer)
    self.label_manager = SimpleNamespace(
        has_regions=regions, ignore_label=3, foreground_regions=[(1, 2), (2,)], foreground_labels=[1, 2]
    )
    self.configuration_manager = SimpleNamespace(
        batch_dice=False,
        pool_op_kernel_sizes=[[1, 1, 1], [2, 2, 2]],
        patch_size=[8, 8, 8],
        configuration={"sparse_trainer": {"stock": {"patch_size": [4, 8, 8]}}},
    )
    self.is_ddp, self.enable_deep_supervision = False, trainer.__name__ == "SparseTrainer"
    self.settings, self.mesh = {"coarse_weight": 0.1}, single_rank_mesh()
    loss = self._build_loss()
    if trainer.__name__ == "HaloTrainer":  # stock's loss, which it runs on parts
        return SpatialLoss(loss, single_rank_mesh(), averaged=False)
    return getattr(self, "loss_of_points", loss)


def targets_of(label: Tensor, regions: bool, scales: list[list[float]] | None) -> Any:
    """What nnU-Net's own transforms make of a label volume."""
    from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
    from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

    items = []
    for item in label:
        sample = {"segmentation": item}
        if regions:
            sample = ConvertSegmentationToRegionsTransform([(1, 2), (2,), (3,)], 0)(**sample)
        sample = DownsampleSegForDSTransform(scales)(**sample) if scales else {"segmentation": [sample["segmentation"]]}
        items.append(sample["segmentation"])
    targets = [torch.stack([item[level] for item in items]).float() for level in range(len(items[0]))]
    return targets if scales else targets[0]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("name", ["SparseTrainer", "CLSTMTrainer", "HaloTrainer"])
def test_the_trainers_losses_leave_out_ignored_voxels_at_every_resolution(
    name: str, regions: bool, everything: bool
) -> None:
    plugins = pytest.importorskip("nnunet_plugins", reason="the extra `nnunet` is not installed")
    label = torch.randint(0, 3, (2, 1, 8, 8, 8), dtype=torch.int16)
    label[:, :, 3:] = 3
    if everything:
        label[:] = 3
    deep = name == "SparseTrainer"
    target = targets_of(label, regions, [[1.0] * 3, [0.5] * 3] if deep else None)
    shapes = [(2, 2 + (not regions), *t.shape[2:]) for t in (target if deep else [target])]
    logits = [torch.randn(shape, requires_grad=True) for shape in shapes]
    loss = loss_of(getattr(plugins, name), regions)(logits if deep else logits[0], target)
    loss.backward()
    assert loss.isfinite()
    for level in logits:
        assert level.grad is not None
        assert level.grad.isfinite().all()
        step = 8 // level.shape[2]
        unknown = -torch.nn.functional.max_pool3d(-(label == 3).float(), step) > 0
        assert not level.grad[unknown.expand_as(level)].any()
        assert everything or level.grad.any()


def test_the_occupancy_trainer_draws_no_ignored_points_and_survives_a_patch_of_nothing_else() -> None:
    plugins = pytest.importorskip("nnunet_plugins", reason="the extra `nnunet` is not installed")
    label = torch.randint(0, 3, (2, 1, 8, 8, 8), dtype=torch.int16)
    label[0, :, :5], label[1] = 3, 3
    self = object.__new__(plugins.OccupancyTrainer)
    self.label_manager = SimpleNamespace(has_regions=False, ignore_label=3)
    self.device, self.grad_scaler = torch.device("cpu"), None
    self.settings = {"points": 64, "sampling": {"uniform": 0.5, "border": 0.25, "balanced": 0.25}}
    self.network = OccupancyNet(1, 3, None, (4, 8), "interpolated", width=8, blocks=1)
    self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1)
    inner, seen = loss_of(plugins.OccupancyTrainer, False), []
    self.loss_of_points = lambda pred, target: seen.append(target[0]) or inner(pred, target)
    batch = {"data": torch.randn(2, 1, 8, 8, 8), "target": label}
    assert torch.isfinite(torch.as_tensor(self.train_step(batch)["loss"]))
    assert not (seen[0][0] == 3).any()
    before = [p.detach().clone() for p in self.network.parameters()]
    label[:] = 3
    assert self.train_step(batch)["loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, self.network.parameters(), strict=True))

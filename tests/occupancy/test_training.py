"""Loss, optimizer, schedule, scores, and a training run by MONAI's engine that learns a ball."""

from __future__ import annotations

import math

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from torch import nn
from torch.nn import functional as F

from monai_memeff.occupancy import (
    Lookahead,
    OccupancyLoss,
    OccupancyNet,
    PadeActivation,
    PrepareBatchOccupancy,
    RandOccupancyPointsd,
    SampledDiceMetric,
    occupancy_optimizer,
)
from monai_memeff.occupancy.loss import coarse_label
from monai_memeff.occupancy.sampling import border_band
from tests.occupancy.reference import ball
from tests.oracles import asymmetric

# Loss


def test_the_published_loss() -> None:
    """Binary cross-entropy of points, and a tenth of that of the max-pooled label."""
    logits, coarse = asymmetric((2, 11, 1)), asymmetric((2, 1, 2, 3, 2))
    values = (asymmetric((2, 11)) > 0).long()
    label = torch.cat([ball((8, 12, 8), 3.0), torch.zeros(1, 1, 8, 12, 8, dtype=torch.long)])
    p = logits[..., 0].sigmoid()
    expected = -(values * p.log() + (1 - values) * (1 - p).log()).mean()
    aim = F.max_pool3d(label.double(), 4)
    q = coarse.sigmoid()
    second = -(aim * q.log() + (1 - aim) * (1 - q).log()).mean()
    torch.testing.assert_close(
        OccupancyLoss()((logits, coarse), (values, label)), (expected + 0.1 * second).float(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(OccupancyLoss()((logits, None), (values, label)), expected.float())
    none = OccupancyLoss(coarse_weight=0)((logits, coarse), (values, label))
    torch.testing.assert_close(none, expected.float())


def test_several_classes_and_another_loss() -> None:
    logits, values = asymmetric((2, 11, 3)), (asymmetric((2, 11)) * 1.49 + 1.5).long()
    label = torch.zeros(2, 1, 4, 4, 4)
    plain = OccupancyLoss()((logits, None), (values, label))
    torch.testing.assert_close(plain, F.cross_entropy(logits.reshape(-1, 3), values.reshape(-1)).float())
    dice = DiceCELoss(to_onehot_y=True, softmax=True)
    found = OccupancyLoss(dice)((logits, None), (values, label))
    torch.testing.assert_close(found, dice(logits.transpose(1, 2).float(), values[:, None]))


def test_a_coarse_cell_has_its_most_frequent_foreground() -> None:
    label = torch.zeros(1, 1, 4, 4, 8)
    label[..., 0, 0, 0] = 2  # one voxel of 2 in the first cell: foreground all the same
    label[..., 2:, 0:2, 4:7] = 1
    label[..., 2:, 2:, 5] = 2
    assert coarse_label(label, (1, 1, 2), 3, None).tolist() == [[[[2, 1]]]]
    assert coarse_label(label, (1, 1, 2), 1, None).tolist() == [[[[1, 1]]]]
    label[..., 0, 0, 0] = 9
    assert coarse_label(label, (1, 1, 2), 3, 9).tolist() == [[[[0, 1]]]]
    assert coarse_label(label, (1, 1, 2), 1, 9).tolist() == [[[[0, 1]]]]
    assert coarse_label(label[..., :1, :1, :2], (3, 2, 4), 3, None).shape == (1, 3, 2, 4)  # coarser than the label


# Optimizer


def plain_lookahead(start: float, steps: int, k: int, alpha: float) -> list[float]:
    """Algorithm 1 with plain gradient descent on x^2 / 2, one number at a time."""
    slow = fast = start
    seen = []
    for step in range(1, steps + 1):
        fast -= 0.1 * fast
        if step % k == 0:
            slow += alpha * (fast - slow)
            fast = slow
        seen.append(fast)
    return seen


def descend(optimizer: Lookahead, x: nn.Parameter, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        (x**2 / 2).sum().backward()
        optimizer.step()
        seen.append(x.item())
    return seen


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.8), (1, 1.0), (3, 0.5)])
def test_lookahead_is_its_algorithm(k: int, alpha: float) -> None:
    x = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    found = descend(Lookahead(torch.optim.SGD([x], lr=0.1), k, alpha), x, 13)
    assert found == pytest.approx(plain_lookahead(2.0, 13, k, alpha))


def test_lookahead_goes_on_where_it_was_saved() -> None:
    def make() -> tuple[nn.Parameter, Lookahead]:
        x = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        return x, Lookahead(torch.optim.RAdam([x], lr=0.1), 3, 0.7)

    x, optimizer = make()
    descend(optimizer, x, 7)
    y, other = make()
    y.data.copy_(x.data)
    other.load_state_dict(torch.load(_saved(optimizer.state_dict()), weights_only=True))
    assert descend(other, y, 7) == descend(optimizer, x, 7)


def _saved(state: dict) -> object:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_the_published_optimizer_and_schedule() -> None:
    network = OccupancyNet(1, volume_shape=(8, 8, 8), channels=(2,), variant="c", width=8)
    optimizer = occupancy_optimizer(network)
    assert isinstance(optimizer.optimizer, torch.optim.RAdam)
    assert (optimizer.k, optimizer.alpha) == (5, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 1e-2]
    units = sum(isinstance(module, PadeActivation) for module in network.modules())
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert sizes[1] == 10 * units
    assert sum(sizes) == sum(p.numel() for p in network.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 30])
    rates = []
    for _ in range(50):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates == pytest.approx([3e-4] * 20 + [3e-5] * 10 + [3e-6] * 20)
    plain = occupancy_optimizer(OccupancyNet(1, variant="interpolated", channels=(4,)))
    assert len(plain.param_groups) == 1


@pytest.mark.parametrize("bad", [{"k": 0}, {"alpha": 0.0}, {"alpha": 1.1}])
def test_lookahead_refuses_nonsense(bad: dict) -> None:
    with pytest.raises(ValueError, match="k must be 1 or more and alpha"):
        Lookahead(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), **bad)


# Scores


def test_sampled_dice_approaches_dense_dice_with_uniform_points() -> None:
    truth, guess = ball((30, 28, 26), 9.0), ball((30, 28, 26), 7.5)
    dense = 2 * (truth & guess).sum() / (truth.sum() + guess.sum())
    sampled = SampledDiceMetric(2**17, "uniform")
    sampled(guess, truth)
    assert float(sampled.aggregate()) == pytest.approx(float(dense), abs=0.02)


def test_points_near_the_border_score_lower() -> None:
    """The quirk of the published table for the liver: 40 % of the points come from a band around the border."""
    truth, guess = ball((60, 56, 58), 20.0), ball((60, 56, 58), 19.0)
    dense, sampled = DiceMetric(), SampledDiceMetric()
    dense(guess.float(), truth.float())
    sampled(guess, truth)
    fractions = [float((guess[0, 0] != truth[0, 0])[where].float().mean()) for where in (..., border_band(truth[0, 0]))]
    assert fractions[1] > fractions[0]
    assert float(sampled.aggregate()) < float(dense.aggregate()) - 0.003


def test_classes_are_scored_one_by_one_and_absent_ones_left_out() -> None:
    truth = torch.cat([ball((20, 20, 20), 6.0), ball((20, 20, 20), 6.0, 2)])
    guess = torch.cat([truth[:1], torch.zeros_like(truth[:1])])
    metric = SampledDiceMetric(4000, "uniform", classes=3, reduction="none")
    scores = metric(guess, truth)
    assert scores[0, 0] == 1
    assert scores[1, 1] == 0
    assert bool(scores[0, 1:].isnan().all())
    assert bool(scores[:, 2].isnan().all())
    assert float(metric.aggregate("mean")) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"labels \(B, 1, H, W, D\)"):
        metric(guess, truth[:1])


# Training


@pytest.mark.parametrize("own_points", [True, False], ids=["transform", "drawn on the device"])
@pytest.mark.parametrize("variant", ["c", "interpolated"])
@pytest.mark.long
def test_monais_trainer_learns_a_ball(own_points: bool, variant: str) -> None:
    shape = (16, 16, 16)
    network = OccupancyNet(1, 1, volume_shape=shape, channels=(4, 8), variant=variant, width=16)
    labels = [ball(shape, radius)[0].float() for radius in (5.0, 6.0)]
    data = [{"image": label + 0.1 * torch.randn(1, *shape), "label": label} for label in labels]
    points = RandOccupancyPointsd("label", num_samples=512) if own_points else None
    losses: list[float] = []

    class Recording(OccupancyLoss):
        def forward(self, pred, target):
            loss = super().forward(pred, target)
            losses.append(loss.item())
            return loss

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=45,
        train_data_loader=DataLoader(Dataset(data, points), batch_size=2),
        network=network,
        optimizer=occupancy_optimizer(network, lr=1e-2, pade_lr=1e-2),
        loss_function=Recording(),
        prepare_batch=PrepareBatchOccupancy(num_samples=512),
    )
    trainer.run()
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])

"""Values that are not labels: refused by losses, scores and what draws points or paints tumors, never used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from monai_memeff.apps.liver import LesionDiceMetric, LiverTumorLoss, RandTumorSynthesis
from monai_memeff.checks import check_labels
from monai_memeff.errors import InputError
from monai_memeff.occupancy import OccupancyLoss, RandOccupancyPoints, SampledDiceMetric

LOGITS = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
LABEL = torch.arange(120).reshape(1, 1, 4, 5, 6) % 3
WRONG: dict[str, tuple[float, str]] = {
    "ignored": (-100, "got -100"),  # torch's cross entropy leaves it out, a Dice term takes it for background
    "unknown": (255, "got 255"),
    "negative": (-1, "got -1"),
    "fraction": (0.5, "whole numbers, got fractions"),
    "nan": (float("nan"), "1 NaN"),
}


def with_value(value: float) -> Tensor:
    label = LABEL.float().clone()
    label[0, 0, 1, 2, 3] = value
    return label


@pytest.mark.parametrize("kind", WRONG)
def test_the_loss_takes_labels_of_its_classes_only(kind: str) -> None:
    value, words = WRONG[kind]
    with pytest.raises(ValueError, match=words):
        LiverTumorLoss()(LOGITS, with_value(value))


@pytest.mark.parametrize("kind", WRONG)
def test_the_score_takes_labels_only(kind: str) -> None:
    value, words = WRONG[kind]
    for pair in ((with_value(value), LABEL), (LABEL, with_value(value))):
        with pytest.raises(ValueError, match=words):
            LesionDiceMetric()(*pair)
    with pytest.raises(ValueError, match="got"):
        LesionDiceMetric()(LOGITS, LABEL)  # logits are not one-hot maps


@pytest.mark.parametrize("kind", WRONG)
def test_the_synthesis_takes_liver_and_lesion_only(kind: str) -> None:
    value, words = WRONG[kind]
    with pytest.raises(ValueError, match=words):
        RandTumorSynthesis(prob=1.0)(LOGITS[0, :1], with_value(value)[0])
    with pytest.raises(ValueError, match="NaN"):
        RandTumorSynthesis(prob=1.0)(with_value(float("nan"))[0], LABEL[0])


# Occupancy


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", WRONG)
def test_the_occupancy_loss_takes_labels_of_its_classes_only(kind: str, own: bool, channels: int) -> None:
    """In points and in volumes, where every other label would be background of a coarse cell, or foreground of one."""
    value, words = WRONG[kind]
    label = LABEL.clamp(0, max(channels - 1, 1))
    point_loss = DiceCELoss(to_onehot_y=channels > 1, softmax=channels > 1, sigmoid=channels == 1)
    logits = torch.randn(1, 20, channels), torch.randn(1, channels, 2, 2, 2)
    points = label.flatten(1)[:, :20].float()
    odd_volume, odd_points = label.float().clone(), points.clone()
    odd_volume[0, 0, 1, 2, 3] = odd_points[0, 7] = value
    for target in ((points, odd_volume), (odd_points, label)):
        loss = OccupancyLoss(point_loss if own else None)
        with pytest.raises(InputError, match=words):
            loss(logits, target)
        if math.isfinite(value) and value == int(value):
            assert OccupancyLoss(None, ignore_index=int(value))(logits, target).isfinite()


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "unknown"])
def test_points_are_drawn_of_labels_only_and_scored_against_labels_only(kind: str) -> None:
    value, words = WRONG[kind]
    for draw in (RandOccupancyPoints(50, "uniform"), RandOccupancyPoints(50, "balanced")):
        with pytest.raises(ValueError, match=words.replace("1 NaN", "NaN")):
            draw(with_value(value)[0])
    everywhere = torch.full_like(LABEL.float(), value)
    for pair in ((everywhere, LABEL), (LABEL, everywhere)):
        with pytest.raises(ValueError, match=words.replace("1 NaN", "NaN")):
            SampledDiceMetric(50)(*pair)


SHAPES: list[tuple[Callable[..., Any], Tensor, Tensor]] = [
    (LiverTumorLoss(), LOGITS, torch.nn.functional.one_hot(LABEL[:, 0], 3).movedim(-1, 1)),
    (LiverTumorLoss(), LOGITS, LABEL[..., :5]),
    (LiverTumorLoss(), LOGITS[:, :2], LABEL),
    (LiverTumorLoss(), LOGITS.repeat(2, 1, 1, 1, 1), LABEL),
    (LesionDiceMetric(), LABEL, LABEL[..., :5]),
    (LesionDiceMetric(), torch.cat([LABEL == 0, LABEL == 2], 1), LABEL),
    (LesionDiceMetric(), LABEL.repeat(2, 1, 1, 1, 1), LABEL),
    (RandTumorSynthesis(prob=1.0), LOGITS[0], LABEL[0]),
    (RandTumorSynthesis(prob=1.0), LOGITS[0, :1], LABEL[0, ..., :5]),
]


@pytest.mark.parametrize(("take", "first", "second"), SHAPES)
def test_shapes_that_do_not_fit_are_refused(take: Callable[..., Any], first: Tensor, second: Tensor) -> None:
    with pytest.raises(ValueError, match="got") as refusal:
        take(first, second)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.bool, torch.uint16])
def test_labels_of_every_dtype_are_taken(kind: torch.dtype) -> None:
    check_labels((LABEL % 2).to(kind), "a test", 2)
    check_labels(torch.zeros(0, dtype=kind), "a test", 2)
    expected = LiverTumorLoss()(LOGITS, LABEL % 2)
    assert torch.equal(LiverTumorLoss()(LOGITS, (LABEL % 2).to(kind)), expected)

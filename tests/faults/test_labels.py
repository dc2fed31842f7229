"""Values that are not labels, in the liver application: refused by loss, score and synthesis, never used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monai_memeff.apps.liver import LesionDiceMetric, LiverTumorLoss, RandTumorSynthesis
from monai_memeff.checks import check_labels

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


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind != "unknown"])
def test_the_score_takes_labels_only(kind: str) -> None:
    value, words = WRONG[kind]
    for pair in ((with_value(value), LABEL), (LABEL, with_value(value))):
        with pytest.raises(ValueError, match=words):
            LesionDiceMetric()(*pair)
    with pytest.raises(ValueError, match="got"):
        LesionDiceMetric()(LOGITS, LABEL)  # logits are no one-hot maps


@pytest.mark.parametrize("kind", WRONG)
def test_the_synthesis_takes_liver_and_lesion_only(kind: str) -> None:
    value, words = WRONG[kind]
    with pytest.raises(ValueError, match=words):
        RandTumorSynthesis(prob=1.0)(LOGITS[0, :1], with_value(value)[0])
    with pytest.raises(ValueError, match="NaN"):
        RandTumorSynthesis(prob=1.0)(with_value(float("nan"))[0], LABEL[0])


SHAPES: list[tuple[Callable[..., Any], Tensor, Tensor]] = [
    (LiverTumorLoss(), LOGITS, torch.nn.functional.one_hot(LABEL[:, 0], 3).movedim(-1, 1)),
    (LiverTumorLoss(), LOGITS, LABEL[..., :5]),
    (LiverTumorLoss(), LOGITS[:, :2], LABEL),
    (LiverTumorLoss(), LOGITS.repeat(2, 1, 1, 1, 1), LABEL),
    (LesionDiceMetric(), LABEL, LABEL[..., :5]),
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

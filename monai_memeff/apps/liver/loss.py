"""The liver tumor loss of Hou et al. 2019."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_memeff.arguments import check_count, numbers_checked
from monai_memeff.checks import check_finite, check_labels


class LiverTumorLoss(nn.Module):
    """0.2 Dice + 0.8 weighted cross entropy, Hou et al. 2019 (https://arxiv.org/abs/1909.03108) and their code.

    The Dice term is minus the mean of the lesion's soft Dice per case and over the whole batch, 2 I / (S + 0.1); cross
    entropy weighs background, liver and lesion voxels by 1, 8 and 16 and is averaged over all voxels.

    Args:
        class_weights: Weight of every class.
        lesion: Class of the Dice term.
        dice_weight: Weight of the Dice term; that of cross entropy is 1 minus this.

    Raises:
        ValueError: lesion below 1 or none of the classes, a negative weight, or dice_weight above 1.

    Examples:
        >>> logits = torch.zeros(1, 3, 8, 8, 8, requires_grad=True)
        >>> LiverTumorLoss()(logits, torch.zeros(1, 1, 8, 8, 8)).backward()
    """

    @numbers_checked
    def __init__(
        self, class_weights: Sequence[float] = (1.0, 8.0, 16.0), lesion: int = 2, dice_weight: float = 0.2
    ) -> None:
        super().__init__()
        check_count("lesion", lesion)
        if lesion >= len(class_weights):
            raise ValueError(f"lesion must be one of the {len(class_weights)} classes, got {lesion}.")
        self.register_buffer("class_weights", torch.tensor(list(class_weights)), persistent=False)
        self.class_weights: Tensor
        self.lesion, self.dice_weight = lesion, dice_weight

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (B, C, spatial...) and labels (B, 1, spatial...), all annotated.

        Raises:
            ValueError: another number of classes or shape, NaN or infinity, or values that are not labels of a class.
        """
        self._check(prediction, target)
        labels = target[:, 0].long()
        weights = self.class_weights.to(prediction)
        entropy = F.cross_entropy(prediction, labels, weight=weights, reduction="none").mean()
        p = prediction.softmax(1)[:, self.lesion]
        t = (labels == self.lesion).to(p.dtype)
        space = tuple(range(1, p.dim()))
        hit, size = (p * t).sum(space), (p + t).sum(space)
        per_case = (2 * hit / (size + 0.1)).mean()
        overall = 2 * hit.sum() / (size.sum() + 0.1)
        return (1 - self.dice_weight) * entropy - self.dice_weight * (per_case + overall) / 2

    def _check(self, prediction: Tensor, target: Tensor) -> None:
        classes = len(self.class_weights)
        if prediction.shape[1:2] != (classes,) or target.shape != (len(prediction), 1, *prediction.shape[2:]):
            raise ValueError(
                f"LiverTumorLoss takes logits (B, {classes}, ...) and labels (B, 1, ...) of one shape, "
                f"got {tuple(prediction.shape)} and {tuple(target.shape)}."
            )
        check_finite(prediction, "LiverTumorLoss")
        check_labels(target, "LiverTumorLoss", classes)

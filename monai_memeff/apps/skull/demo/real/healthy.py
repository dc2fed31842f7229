"""Training on the healthy bone of a head that has a hole: nothing is taught where nobody knows what was there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monai_memeff.apps.skull import RandSkullDefect, RandSkullVariation
from monai_memeff.apps.skull.demo.real.holes import SkullHole
from monai_memeff.apps.skull.demo.volume import HeadVolume

UNKNOWN = 2
"""Value of cells in a target that teach nothing."""
SHIFT = 2  # cells by which the hole's own shape is moved
MIRRORED = 0.6  # of the first heads of the batches; the others are the patient
OWN_SHAPE = 0.7  # of the heads that are whole at the hole's place, this part gets a defect of its shape there


@dataclass(frozen=True)
class TrainingHead:
    """One head to cut defects into.

    Attributes:
        skull: float (1, S, S, S), 1 is bone.
        target: float (1, S, S, S), the skull with ``UNKNOWN`` where bone may be missing.
        whole: whether the place of the real hole holds healthy bone in this head.
    """

    skull: Tensor
    target: Tensor
    whole: bool


def training_heads(
    head: HeadVolume, hole: SkullHole, mirrored: np.ndarray, mirrored_zone: np.ndarray, generated: Sequence[np.ndarray]
) -> list[TrainingHead]:
    """The patient, the patient's mirror image, and generated heads.

    Args:
        head: the patient's head with the hole.
        hole: the hole.
        mirrored: bool (S, S, S), the registered mirror image of the skull: healthy bone where the hole is.
        mirrored_zone: bool (S, S, S), the mirror image of the hole's zone.
        generated: skulls, bool (S, S, S).
    """
    known = [(head.skull, hole.zone, False), (mirrored, mirrored_zone, True)]
    nothing = np.zeros_like(head.skull)
    return [_head(*given) for given in (*known, *((skull, nothing, True) for skull in generated))]


def _head(skull: np.ndarray, zone: np.ndarray, whole: bool) -> TrainingHead:
    target = np.where(skull, 1.0, np.where(zone, float(UNKNOWN), 0.0)).astype(np.float32)
    return TrainingHead(torch.from_numpy(skull[None].astype(np.float32)), torch.from_numpy(target[None]), whole)


class HealthyBoneSampler:
    """Batches of heads with synthetic defects: one of the patient or the mirror image, the others of any head.

    Args:
        heads: see :func:`training_heads`; the first two are the patient and the mirror image.
        hole: the hole, whose shape is one of the defects.
        seed: seed of defects and choices.
        batch_size: heads in a batch.
    """

    def __init__(self, heads: Sequence[TrainingHead], hole: SkullHole, seed: int, batch_size: int = 2) -> None:
        self.heads, self.core, self.batch_size = list(heads), hole.core, batch_size
        self.random = np.random.RandomState(seed)
        self.defect = RandSkullDefect()
        self.defect.set_random_state(seed)
        self.variation = RandSkullVariation(rotation=0.05, scale=0.05, shear=0.02, bend=0.01, cut=0.0)
        self.variation.set_random_state(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Defective heads, and what is to be learned of them: float (B, 1, S, S, S)."""
        places = [int(self.random.random_sample() < MIRRORED)]
        places += [self.random.randint(len(self.heads)) for _ in range(self.batch_size - 1)]
        chosen = [self._varied(self.heads[place]) for place in places]
        return torch.stack([self._cut(head) for head in chosen]), torch.stack([head.target for head in chosen])

    def _varied(self, head: TrainingHead) -> TrainingHead:
        """A head that is not the patient, a little otherwise each time: what fills it must not be learned by heart."""
        if not head.whole:
            return head
        skull = self.variation(head.skull)
        unknown = self.variation((head.target == UNKNOWN).float(), randomize=False)
        return TrainingHead(skull, torch.where(skull > 0, 1.0, unknown * UNKNOWN), True)

    def _cut(self, head: TrainingHead) -> Tensor:
        if head.whole and self.random.random_sample() < OWN_SHAPE:
            shift = tuple(self.random.randint(-SHIFT, SHIFT + 1, 3).tolist())
            defective = head.skull * ~torch.from_numpy(np.roll(self.core, shift, (0, 1, 2)))
            if defective.any():
                return defective
        return self.defect(head.skull)[0].as_subclass(Tensor)

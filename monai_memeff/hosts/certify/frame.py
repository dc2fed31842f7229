"""The volume in extents that a network takes: its own, or with zeros around it, and results cropped back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from monai_memeff.halo.frame import around, attempt_dry, extents_taken
from monai_memeff.hosts.certify.sources.subject import Subject
from monai_memeff.memory.dry import DryRun


@dataclass
class Frame:
    """The volume as whole and streamed network see it: with zeros around it where the network takes no other."""

    inputs: Tensor
    extents: tuple[int, ...]
    whole_bytes: int | None

    @property
    def padded(self) -> bool:
        """Whether it is larger than the volume."""
        return tuple(self.inputs.shape[2:]) != self.extents

    def crop(self, answer: Any) -> Any:
        """A result without the padding, on the CPU."""
        size = tuple(self.inputs.shape[2:])
        first = [(new - own) // 2 for own, new in zip(self.extents, size, strict=True)]
        inside = (..., *(slice(start, start + own) for start, own in zip(first, self.extents, strict=True)))

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            plain = leaf.detach().as_subclass(Tensor).cpu()
            return plain[inside].contiguous() if self.padded and tuple(plain.shape[2:]) == size else plain

        return pytree.tree_map(one, answer)


def frame(subject: Subject) -> Frame:
    """The volume in extents that come back (:func:`monai_memeff.halo.frame.extents_taken`)."""
    plain = subject.inputs.as_subclass(Tensor)
    extents = tuple(plain.shape[2:])
    size, found = extents_taken(extents, lambda size: _dry_run(subject, (*plain.shape[:2], *size)))
    if found is None:
        return Frame(plain, extents, None)
    inputs = torch.nn.functional.pad(plain, around(extents, size))
    return Frame(inputs, extents, found.peak_bytes + inputs.nbytes)


def _dry_run(subject: Subject, shape: tuple[int, ...]) -> DryRun | None:
    """The whole network at a shape; None where it does not take it (or cannot be run without values)."""
    if subject.args or subject.kwargs:
        return None
    with subject.precision():
        return attempt_dry(subject.network, shape[:2], subject.inputs.dtype)(shape[2:])

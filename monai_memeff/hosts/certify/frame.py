"""The volume in extents that a network takes: its own, or with zeros around it, and results cropped back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from monai_memeff.hosts.certify.sources.subject import Subject
from monai_memeff.memory.dry import DryRun, dry_run
from monai_memeff.memory.step import tensors_in

DIVISORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Numbers of which the extents of a volume may have to be multiples, for networks that halve them."""

TRIAL_LOG = "torch._subclasses.fake_tensor"
"""Logger that reports every shape a network does not take."""


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
    """The volume in extents that come back: its own, or the next multiples of a number, with zeros around.

    A network that halves rounds odd extents up: it takes 15 voxels and returns 16, none of them the volume's.
    """
    plain = subject.inputs.as_subclass(Tensor)
    extents, taken = tuple(plain.shape[2:]), list[Frame]()
    for divisor in DIVISORS:
        size = tuple(-(-extent // divisor) * divisor for extent in extents)
        found = _dry_run(subject, (*plain.shape[:2], *size))
        if found is None:
            continue
        more = [new - own for own, new in zip(extents, size, strict=True)]
        around = [part for extra in reversed(more) for part in (extra // 2, extra - extra // 2)]
        inputs = torch.nn.functional.pad(plain, around)
        taken.append(Frame(inputs, extents, found.peak_bytes + inputs.nbytes))
        if all(tuple(tensor.shape[2:]) == size for tensor in list(tensors_in(found.result))[:1]):
            return taken[-1]
    return taken[0] if taken else Frame(plain, extents, None)


def _dry_run(subject: Subject, shape: tuple[int, ...]) -> DryRun | None:
    """The whole network at a shape; None where it does not take it (or cannot be run without values)."""
    if subject.args or subject.kwargs:
        return None
    try:
        with _quiet(), subject.precision():
            return dry_run(subject.network, shape, subject.inputs.dtype, subject.network, False)
    except Exception:  # of the network, of any kind: the run itself says it in words
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger(TRIAL_LOG)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before

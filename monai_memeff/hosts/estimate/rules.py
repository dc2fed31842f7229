"""Which system suits a network and an image, by rules that can be read: docs/howto/estimate.md has them as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

ACTIVE = 0.25
"""Share of active voxels up to which a sparse network suits: above it neighbors and features cost as much."""

ACTIVE_BELOW_STEM = 0.1
"""The same where the stem has a stride: the dense network computes little at full resolution either."""

CLASSES = 16
"""Number of classes above which points do not suit: boundaries are everywhere, and every point answers all classes."""


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Attributes:
        training: whether a step of training is meant.
        active: share of active voxels of the image, None without an image.
        classes: Number of channels of the output, None if unknown.
        norms: kinds of norm layers in the network.
        stem: total stride of the first convolution.
    """

    training: bool
    active: float | None
    classes: int | None
    norms: tuple[str, ...]
    stem: int


@dataclass(frozen=True)
class Verdict:
    """Whether a system suits, and why.

    Attributes:
        suits: True, False, or None where a fact is missing.
        why: in words.
    """

    suits: bool | None
    why: str


def facts_of(network: nn.Module, classes: int | None, active: float | None, training: bool) -> Facts:
    """The facts of a network."""
    return Facts(training, active, classes, tuple(sorted(set(_norms(network)))), _stem(network))


def verdict(system: str, facts: Facts) -> Verdict:
    """Whether a system suits, by the rules."""
    return {"dense": _dense, "halo": _halo, "sparse": _sparse, "occupancy": _occupancy, "clstm": _clstm}[system](facts)


def _dense(facts: Facts) -> Verdict:
    return Verdict(True, "the network as it is")


def _halo(facts: Facts) -> Verdict:
    if facts.training:
        return Verdict(False, "one device streams inference alone; training needs several (overlay halo, torchrun)")
    norms = [norm for norm in facts.norms if norm in ("instance", "group", "layer")]
    why = "same weights, same answer as the whole network"
    return Verdict(True, f"{why}; {' and '.join(norms)} norm sees the whole volume" if norms else why)


def _sparse(facts: Facts) -> Verdict:
    if facts.active is None:
        return Verdict(None, "depends on the share of active voxels: give --image")
    limit = ACTIVE if facts.stem == 1 else ACTIVE_BELOW_STEM
    bound = f"{limit:.0%}" if facts.stem == 1 else f"{limit:.0%} (stem of stride {facts.stem})"
    if facts.active > limit:
        return Verdict(False, f"{facts.active:.0%} of the voxels are active, above {bound}")
    why = f"{facts.active:.1%} of the voxels are active, at most {bound}"
    norms = [norm for norm in facts.norms if norm != "batch"]
    return Verdict(True, f"{why}; {' and '.join(norms)} norm sees active voxels alone: train it" if norms else why)


def _occupancy(facts: Facts) -> Verdict:
    if facts.classes is None:
        return Verdict(None, "depends on the number of classes, which the output does not tell")
    if facts.classes > CLASSES:
        return Verdict(False, f"{facts.classes} classes, above {CLASSES}: boundaries are everywhere")
    return Verdict(True, f"{facts.classes} classes, at most {CLASSES}; they must exclude each other; to be trained")


def _clstm(facts: Facts) -> Verdict:
    what = "memory of a step hardly grows with the depth" if facts.training else "slab by slab"
    return Verdict(True, f"{what}, any number of classes; to be trained")


def _norms(network: nn.Module) -> Iterator[str]:
    for module in network.modules():
        name = type(module).__name__
        for kind in ("instance", "group", "layer", "batch"):
            if f"{kind}norm" in name.lower():
                yield kind


def _stem(network: nn.Module) -> int:
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            stride: Any = module.stride
            return max(stride)
    return 1

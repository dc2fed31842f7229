"""The table of rules: for every operator how it is bound, and which operators are taken apart first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from monai_memeff.halo.planning.program import Program, Ref, Value
from monai_memeff.halo.planning.rules.base import Binder


@dataclass
class Rule:
    """One row of the table.

    Attributes:
        bind: makes the step; raises NoTileError where the operator has to run whole.
        family: the file it stands in, for the printed table.
        note: what it does, in a few words.
    """

    bind: Binder
    family: str
    note: str


RULES: dict[Any, Rule] = {}
EXPANDERS: dict[Any, Callable[[Expansion], Ref | None]] = {}


def overloads(name: str) -> list[Any]:
    """The aten overloads of a name such as "conv3d.default" or "conv3d" (all of them); none if this torch lacks it."""
    head, _, tail = name.partition(".")
    packet = getattr(torch.ops.aten, head, None)
    if packet is None:
        return []
    return [getattr(packet, t) for t in packet.overloads() if not tail or t == tail]


def rule(names: str | Sequence[str], family: str, note: str) -> Callable[[Binder], Binder]:
    """Enter a binder into the table under these operators (aten names, or words such as "halo.moments")."""

    def enter(bind: Binder) -> Binder:
        for name in [names] if isinstance(names, str) else names:
            for target in [name] if name.startswith("halo.") else overloads(name):
                RULES[target] = Rule(bind, family, note)
        return bind

    return enter


class Expansion:
    """Lets a rule family replace one call by several simpler ones while the graph is lowered."""

    def __init__(self, program: Program, value: Value) -> None:
        self.program, self.value = program, value

    def add(
        self,
        suffix: str,
        target: Any,
        shape: Sequence[int],
        args: Sequence[Any],
        dtype: torch.dtype | None = None,
        **kw: Any,
    ) -> Ref:
        """Append a value made by `target` and return its reference."""
        made = Value(
            f"{self.value.name}_{suffix}" if suffix else self.value.name,
            tuple(int(n) for n in shape),
            dtype or self.value.dtype,
            target,
            tuple(args),
            kw,
            None,
            self.value.where,
        )
        made.dependent = any(self.program[i].dependent for i in made.refs())
        return self.program.add(made)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """Whole shape of a value."""
        return self.program[ref].shape

    def dtype(self, ref: Ref) -> torch.dtype:
        """Type of a value."""
        return self.program[ref].dtype


def expander(
    names: str | Sequence[str],
) -> Callable[[Callable[[Expansion], Ref | None]], Callable[[Expansion], Ref | None]]:
    """Enter an expander: it returns the reference that takes the call's place, or None to keep the call."""

    def enter(fn: Callable[[Expansion], Ref | None]) -> Callable[[Expansion], Ref | None]:
        for name in [names] if isinstance(names, str) else names:
            for target in overloads(name):
                EXPANDERS[target] = fn
        return fn

    return enter

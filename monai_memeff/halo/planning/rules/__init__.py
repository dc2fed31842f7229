"""One rule per operator: which input rows its output rows need, and how they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from monai_memeff.halo.planning.errors import NoTileError, NotPartitionableError
from monai_memeff.halo.planning.layout import Layout
from monai_memeff.halo.planning.program import Value
from monai_memeff.halo.planning.rules import extremes, mixing, norm, pointwise, random, reduction, reshape, select
from monai_memeff.halo.planning.rules.base import Context, Step, arguments, whole_step, whole_word
from monai_memeff.halo.planning.rules.table import RULES, Rule
from monai_memeff.halo.planning.rules.windowed import convolution, padding, pooling, resize, transposed


def bind(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """The step of a value whose inputs have these layouts.

    Raises:
        NotPartitionableError: if the operator draws random numbers, has a side effect or a shape that depends on the
            data, and no rule knows it.
    """
    row = RULES.get(value.target)
    if row is None and pointwise.is_pointwise(value.target):
        row = Rule(pointwise.bind_pointwise, "pointwise", "")
    if row is not None:
        try:
            return row.bind(value, natives, ctx)
        except NoTileError:
            pass
    if row is not None and isinstance(value.target, str):  # no operator of torch's: its own step on whole inputs
        return _word(row, value, natives, ctx)
    _check(value)
    return whole_step(value, natives, ctx)


def _word(row: Rule, value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    whole = [ctx.whole(n.shape) for n in natives]
    for context in (ctx, replace(ctx, dims=0)):  # the second spreads nothing by itself
        try:
            return whole_word(row.bind(value, whole, context), natives, ctx)
        except NoTileError as error:
            reason = error
    raise NotPartitionableError(f"{value.where}: {value.operator}: {reason}")


def _check(value: Value) -> None:
    """Refuse what cannot even be run whole."""
    target = value.target
    why = None
    if torch.Tag.nondeterministic_seeded in target.tags and _draws(value):
        why = "draws random numbers"
    elif torch.Tag.data_dependent_output in target.tags:
        why = "has a result whose size depends on the data"
    elif target._schema.is_mutable:
        why = "has a side effect"
    if why is not None:
        raise NotPartitionableError(f"{value.where}: {target} {why}, which no part can repeat")


def _draws(value: Value) -> bool:
    """Whether an operator that may draw random numbers does: recurrent layers and attention may drop nothing."""
    given = arguments(value)
    return bool(given.get("train", True) and given.get("dropout", 1.0) and given.get("dropout_p", 1.0))


FAMILIES = (
    convolution, extremes, mixing, norm, padding, pointwise, pooling, random, reduction, reshape, resize, select,
    transposed,
)  # fmt: skip

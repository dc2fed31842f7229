"""Recompute less than everything: the convolutions that cost most per byte of their output are kept, not repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from monai_memeff.memory import checkpoint

_CONVOLUTION = torch.ops.aten.convolution.default


def kept_from(costs: Sequence[tuple[int, float]], recompute: float) -> int:
    """From how many multiplications per output value on an output must be kept.

    Args:
        costs: Costs of every convolution: multiplications per output value, and in total.
        recompute: Largest fraction of the total that may be repeated.
    """
    allowed = recompute * sum(total for _, total in costs)
    limits = sorted({each for each, _ in costs}, reverse=True)
    for limit in [limits[0] + 1, *limits]:
        if sum(total for each, total in costs if each < limit) <= allowed:
            break
    return limit


def _fan_in(weight: Tensor) -> int:
    return weight[0].numel()


class _KeepConvolutions(TorchDispatchMode):
    """First entered, it keeps the outputs of expensive convolutions; entered again, it hands them out instead."""

    def __init__(self, kept_from: int, store: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kept_from, self.store = kept_from, store
        self.kept: list[Tensor] = []
        self.recomputing = False
        self.turn = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not _CONVOLUTION or _fan_in(args[1]) < self.kept_from:
            return func(*args, **(kwargs or {}))
        if not self.recomputing:
            output = func(*args, **(kwargs or {}))
            self.kept.append(self.store(output))
            return output
        # The second pass runs the same convolutions in the same order, so the n-th call gets the n-th kept output;
        # detached, as autograd, which works above this mode, records a node of its own for it.
        self.turn += 1
        return self.kept[self.turn - 1].to(args[0].device).detach()


def checkpoint_keeping(
    function: Callable[..., Any], *args: Any, kept_from: int | None, store: Callable[[Tensor], Tensor]
) -> Any:
    """:func:`monai_memeff.memory.checkpoint`, but expensive convolutions are not computed a second time.

    Args:
        function: what to run; it must not change a convolution's output in place.
        *args: its arguments.
        kept_from: Fewest multiplications per output value of the convolutions whose outputs are kept; None: none.
        store: where a kept output waits (moves it, or returns it as it is).
    """
    if kept_from is None or not torch.is_grad_enabled():
        return checkpoint(function, *args)
    mode = _KeepConvolutions(kept_from, store)

    # The mode is shared by both passes: torch calls `run` once forward and once in the backward pass, and `recomputing`
    # tells them apart. `turn` begins anew, as a graph may be run backwards twice.
    def run(*inputs: Any) -> Any:
        mode.turn = 0
        with mode:
            outputs = function(*inputs)
        mode.recomputing = True
        return outputs

    return checkpoint(run, *args)

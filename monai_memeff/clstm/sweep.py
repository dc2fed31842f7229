"""One slab through a recurrent network, in as many parts as memory needs, with the same result and state."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monai_memeff.checks import check_logits
from monai_memeff.errors import InputError
from monai_memeff.memory.budget import fitting_part, lacking, measured_part, ran_out


class Trial(NamedTuple):
    """How slices are tried for a budget.

    Attributes:
        depth: slices of the slab.
        run: works on so many of them, and keeps nothing.
        kept: slices of a part -> bytes that lie there all the time.
    """

    depth: int
    run: Callable[[int], object]
    kept: Callable[[int], int]


class Sweep:
    """A network's ``sweep`` and ``state_before`` for slabs of any depth.

    Args:
        network: a CLSTMUNet, or anything with its methods and ``axis``.
        budget: bytes that the work may take on the network's device; None for any number.
        labels: give labels instead of logits.
        prefetch: Number of slabs that wait on the device.
        whole: Shape (B, C, H, W, D) of a volume whose result is kept on the device; None: none is.

    Attributes:
        limit: Number of slices in one part from now on; None before the first slab.
    """

    def __init__(self, network: Any, budget: int | None, labels: bool, prefetch: int, whole: Any = None) -> None:
        self.network, self.budget, self.labels, self.prefetch, self.whole = network, budget, labels, prefetch, whole
        self.limit: int | None = None
        self.device = next(network.parameters()).device

    def __call__(self, slab: Tensor, state: Any, end: Any, home: torch.device) -> tuple[Tensor, Any]:
        """Results of a slab on the device ``home``, and the state after it."""
        parts = self._parts(slab)
        ends = [end]
        for part in reversed(parts[1:]):
            ends.append(self.state_before(part, ends[-1]) if self.network.bidirectional else None)
        results = []
        for number, part in enumerate(parts):
            found = self._one(part, state, ends[-1 - number], home)
            if found is None:  # the state before this part still stands: go on from it with smaller ones
                rest = torch.cat(parts[number:], 2 + self.network.axis)
                more, state = self(rest, state, end, home)
                results.append(more)
                break
            result, state = found
            results.append(result)
        return (results[0] if len(results) == 1 else torch.cat(results, 2 + self.network.axis)), state

    def state_before(self, slab: Tensor, end: Any) -> Any:
        """The backward direction's state before a slab."""
        for part in reversed(self._parts(slab)):
            try:
                end = self.network.state_before(part, end)
                continue
            except RuntimeError as error:
                self._shrink(part, error)
            end = self.state_before(part, end)
        return end

    def _one(self, part: Tensor, state: Any, end: Any, home: torch.device) -> tuple[Tensor, Any] | None:
        try:
            logits, state = self.network.sweep(part, state, end)
            return (_labels(logits) if self.labels else logits).to(home), state
        except RuntimeError as error:
            self._shrink(part, error)
        return None

    def _shrink(self, part: Tensor, error: RuntimeError) -> None:
        """Halve the parts, or say that even one slice is too much."""
        if not ran_out(error, self.device):
            raise error
        depth = part.shape[2 + self.network.axis]
        if depth == 1:
            raise InputError(
                f"one slice of {tuple(part.shape)} {lacking(error, self.device)}: free some, take a smaller plane or "
                "network, or another device"
            ) from error
        self.limit = -(-depth // 2)

    def fit(self, slab: Tensor) -> int:
        """Slices of a part, found at the first slab and smaller after memory ran out."""
        if self.limit is None:
            self.limit = sys.maxsize if self.budget is None else self._fitting(slab, self.budget)
        return self.limit

    def _parts(self, slab: Tensor) -> list[Tensor]:
        axis = 2 + self.network.axis
        return list(slab.split(min(self.fit(slab), slab.shape[axis]), axis)) if slab.shape[axis] else [slab]

    def _fitting(self, slab: Tensor, budget: int) -> int:
        trial = self.trial(slab)
        return fitting_part(trial.depth, measured_part(trial.run, self.device), budget, "slices", kept=trial.kept)

    def trial(self, slab: Tensor) -> Trial:
        """What decides how many slices of a slab fit beside the results and states that stay on the device."""
        axis, depth = 2 + self.network.axis, slab.shape[2 + self.network.axis]
        with torch.no_grad():
            probe, state = self.network.sweep(torch.zeros_like(slab.narrow(axis, 0, 1)))
        one = (_labels(probe) if self.labels else probe).nbytes
        states = sum(part.nbytes for part in state)
        del probe, state
        ahead = 0 if self.device.type == "cpu" else (self.prefetch + 1) * slab.nbytes
        slices = depth if self.whole is None else self.whole[axis]
        results = one * (2 * depth if self.whole is None else slices)  # of a slab in parts: the parts, and them joined

        def kept(part: int) -> int:
            stay = math.ceil(slices / part) if self.network.bidirectional and self.device.type == "cpu" else 0
            inside = math.ceil(depth / part) if self.network.bidirectional and self.whole is None else 0
            return ahead + results + (4 + stay + inside) * states

        def run(part: int) -> object:
            few = torch.zeros_like(slab.narrow(axis, 0, part))
            logits, state = self.network.sweep(few)
            return (_labels(logits) if self.labels else logits), state

        return Trial(depth, run, kept)


def _labels(logits: Tensor) -> Tensor:
    check_logits(logits, "the recurrent network")
    if logits.shape[1] == 1:
        return (logits > 0).to(torch.uint8)
    classes = logits.shape[1]
    dtype = torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32
    return logits.argmax(1, keepdim=True).to(dtype)

"""Every system estimated for one network: what it needs, whether it suits, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from monai_memeff.errors import InputError
from monai_memeff.hosts.estimate.origin import Source
from monai_memeff.hosts.estimate.rules import Verdict, facts_of, verdict
from monai_memeff.memory import NetworkEstimate, estimate_network
from monai_memeff.memory.network import SYSTEMS as ESTIMATED

SYSTEMS = ("dense", *ESTIMATED)
"""In the order of choice: what keeps the weights goes first."""


@dataclass(frozen=True)
class Row:
    """One system.

    Attributes:
        system: its name.
        verdict: whether it suits, by the rules.
        found: the estimate, None if refused.
        refusal: why it is refused, None if it is not.
    """

    system: str
    verdict: Verdict
    found: NetworkEstimate | None
    refusal: str | None


@dataclass(frozen=True)
class Wish:
    """What is to be estimated.

    Attributes:
        shape: Shape of the input.
        training: whether a step of training is meant.
        budget: bytes for everything on the device, None for any number.
        device: where it will run.
        image: active voxels, None without an image.
        active: share of active voxels, None without an image.
        systems: Names, "dense" the first.
    """

    shape: tuple[int, ...]
    training: bool
    budget: int | None
    device: torch.device
    image: Tensor | None
    active: float | None
    systems: Sequence[str]


def rows_of(source: Source, wish: Wish) -> list[Row]:
    """One row for each system; the dense network must be known, or there is nothing to compare with.

    Raises:
        InputError: the network does not take the shape, or its step cannot be run dry.
    """
    source.network.train(wish.training)
    dense = _dense(source, wish)
    classes = dense.output_shape[1] if dense.output_shape is not None and len(dense.output_shape) > 2 else None
    facts = facts_of(source.network, classes, wish.active, wish.training)
    rows = [Row("dense", verdict("dense", facts), dense, _too_large(dense, wish))]
    for system in wish.systems:
        if system != "dense":
            rows.append(_row(source, wish, system, dense, verdict(system, facts)))
    return rows


def _row(source: Source, wish: Wish, system: str, dense: NetworkEstimate, said: Verdict) -> Row:
    try:
        network = source.twins[system]().train(wish.training) if system in source.twins else source.network
        found = _estimate(network, wish, system, None, source.optimizer, _left(wish, system, network))
    except InputError as refusal:
        return Row(system, Verdict(False, said.why), None, str(refusal))
    relative = None
    if dense.multiplications and found.multiplications is not None:
        relative = found.multiplications / dense.multiplications
    return Row(system, said, replace(found, relative_time=relative), None)


def _estimate(
    network: nn.Module,
    wish: Wish,
    system: str,
    loss: Callable[[Any], Tensor] | None,
    optimizer: Callable[[Any], Any] | None,
    budget: int | None = None,
) -> NetworkEstimate:
    return estimate_network(
        network,
        wish.shape,
        training=wish.training,
        system=system,
        memory_budget=budget,
        loss=loss,
        optimizer=optimizer if wish.training else None,
        image=wish.image if system in ("sparse", "occupancy") else None,
        device=wish.device,
    )


def _dense(source: Source, wish: Wish) -> NetworkEstimate:
    """With the host's loss if it takes the network's output and a label of zeros, else with the usual one."""
    try:
        return _estimate(source.network, wish, "dense", source.loss, source.optimizer)
    except InputError:
        if not wish.training or source.loss is None:
            raise
    found = _estimate(source.network, wish, "dense", None, source.optimizer)
    return replace(found, notes=(*found.notes, "with cross-entropy: the host's loss does not take labels of zeros"))


def _left(wish: Wish, system: str, network: nn.Module) -> int | None:
    """Bytes that the step itself may take: what weights, and on a CPU the input, leave of the budget."""
    if wish.budget is None:
        return None
    weights = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    item = next((p.dtype.itemsize for p in network.parameters()), 4)
    outside = system == "halo" and wish.device.type != "cpu"  # its input waits on the host
    volume = 0 if outside else torch.Size(wish.shape).numel() * item
    left = wish.budget - weights - volume
    if left < 1:
        raise InputError(
            f"weights and input alone take {weights + volume} bytes of a budget of {wish.budget}: raise it"
        )
    return left


def _too_large(found: NetworkEstimate, wish: Wish) -> str | None:
    if wish.budget is None or found.total_bytes <= wish.budget:
        return None
    return f"needs {found.total_bytes} bytes with weights and input, and the budget is {wish.budget}"

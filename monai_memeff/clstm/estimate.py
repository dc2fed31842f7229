"""What a recurrent network over slices costs: a dry run of its first slices, extended over the depth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from monai_memeff.clstm.inferer import SlabInferer
from monai_memeff.clstm.network import CLSTMUNet
from monai_memeff.clstm.sweep import Sweep
from monai_memeff.errors import InputError
from monai_memeff.memory.budget import fitting_part
from monai_memeff.memory.dry import DryRun, dry_run
from monai_memeff.memory.forecast import NetworkEstimate, in_units
from monai_memeff.memory.network import Question, described, step_of
from monai_memeff.memory.step import stand_in_loss, tensors_in
from monai_memeff.memory.untouched import home
from monai_memeff.overlays import overlay_path

SLAB = 16
"""Slices of a slab: the overlay's."""


def is_own(network: nn.Module) -> bool:
    """Whether it walks over slices already."""
    return hasattr(network, "sweep")


def estimate(question: Question) -> NetworkEstimate:
    """The network of the overlay ``clstm`` in the place of the one in question, or that one if it is a CLSTMUNet.

    Raises:
        InputError: the input is not a volume, or a budget is too small for single slices.
    """
    network = question.network if is_own(question.network) else _twin(question)
    question = replace(question, network=network)
    if len(question.shape) != 5:
        raise InputError(f"clstm walks over the slices of volumes (B, C, H, W, D), got {question.shape}")
    if question.training:
        return _fitting(question, None, _training(question))
    slab = _slab(question)
    inferer = SlabInferer(slab=slab, memory_budget=question.memory_budget)
    step = partial(SlabInferer(slab=slab, prefetch=0), network=network)
    return _fitting(question, inferer, _extended(question, step, slab))


def _slab(question: Question) -> int:
    """Slices of a slab: the overlay's, or what the inferer takes for the budget, by its own rule on a dry run.

    Raises:
        InputError: one slice is too much.
    """
    along = 2 + int(question.network.axis)
    slab = min(SLAB, question.shape[along])
    if question.memory_budget is None:
        return slab
    on_device = question.shape if question.device == home(question.network) else None
    sweep, kept = Sweep(question.network, question.memory_budget, False, 1, on_device), dict[int, int]()

    def peak(part: int) -> int:
        def step(volume: Tensor) -> object:
            trial = sweep.trial(volume.narrow(along, 0, slab))
            kept[part] = trial.kept(part)
            return trial.run(part)

        return dry_run(question.network, question.shape, question.dtype, step, False).peak_bytes

    return fitting_part(slab, peak, question.memory_budget, "slices", kept=lambda part: kept[part])


def _fitting(question: Question, inferer: SlabInferer | None, found: DryRun) -> NetworkEstimate:
    if question.memory_budget is not None and found.peak_bytes > question.memory_budget:
        raise InputError(
            f"clstm needs {found.peak_bytes} bytes ({in_units(found.peak_bytes)}) for {question.shape}, one slice at a "
            f"time, and memory_budget is {question.memory_budget}: raise it, or take a smaller volume"
        )
    names = ("slab", "memory_budget") if question.memory_budget is not None else ("slab",)
    setting = {name: getattr(inferer, name) for name in names} if inferer is not None else {}
    basis = "a dry run of every operation, of the first slices and extended over the depth"
    notes = () if question.dense is None else ("a network of its own: it needs training", "overlay clstm's sizes")
    return described(
        question, found, "clstm", question.network, basis=basis, setting=setting, inferer=inferer, notes=notes
    )


def _twin(question: Question) -> CLSTMUNet:
    overlay = json.loads(overlay_path("clstm").read_text(encoding="utf-8"))
    arguments = {key.partition("#")[2]: value for key, value in overlay.items() if key.startswith("network_def#")}
    for name in ("_target_", "replacement", "overlay"):
        arguments.pop(name)
    return CLSTMUNet(3, question.shape[1], question.classes, **arguments).train(question.network.training)


def _training(question: Question) -> DryRun:
    """The peak lies in the backward pass of a segment, or in the loss: each of them follows a line of its own."""
    kept = getattr(question.network, "checkpoint", None)
    segment = kept if isinstance(kept, int) else 1 if kept == "slice" else None
    found = _extended(question, step_of(question), segment)
    forward = _extended(question, lambda volume: question.network(volume), segment)

    def loss(_: Tensor) -> None:
        logits = torch.zeros((question.shape[0], *_shape_of(found)[1:2], *question.shape[2:]), dtype=question.dtype)
        (question.loss or stand_in_loss)(logits.requires_grad_()).backward()

    alone = dry_run(question.network, question.shape, question.dtype, loss, True)
    logits = math.prod(question.shape) // question.shape[1] * _shape_of(found)[1] * question.dtype.itemsize
    in_loss = forward.kept_bytes - logits + alone.peak_bytes  # both have the logits
    return replace(found, peak_bytes=max(found.peak_bytes, in_loss))


def _shape_of(found: DryRun) -> tuple[int, ...]:
    return tuple(next(tensors_in(found.result)).shape)


def _extended(question: Question, step: Callable[[Tensor], Any], segment: int | None) -> DryRun:
    """A dry run at the whole depth, or at two depths of whole segments and along the line through them."""
    along = 2 + int(getattr(question.network, "axis", 2))
    depth = question.shape[along]

    def run(slices: int) -> DryRun:
        shape = (*question.shape[:along], slices, *question.shape[along + 1 :])
        return dry_run(question.network, shape, question.dtype, step, question.training)

    unit = 0 if segment is None else segment * math.ceil(4 / segment)
    few = 2 * unit + (depth % segment if segment else 0)
    if segment is None or depth <= few + unit:
        return run(depth)
    low, high = run(few), run(few + unit)
    longer = (depth - few) / unit

    def along_the_line(name: str) -> int:
        first, second = getattr(low, name), getattr(high, name)
        return round(first + (second - first) * longer)

    numbers = ("peak_bytes", "multiplications", "kept_bytes")
    return replace(high, **{name: along_the_line(name) for name in numbers})

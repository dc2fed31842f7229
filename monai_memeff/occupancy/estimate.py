"""What a network of points costs: a dry run of its encoder and of one pass of points, and the octree's own bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.errors import InputError
from monai_memeff.memory.dry import DryRun, dry_run
from monai_memeff.memory.forecast import NetworkEstimate, in_units
from monai_memeff.memory.meter import measure_peak
from monai_memeff.memory.network import Question, described
from monai_memeff.memory.step import tensors_in
from monai_memeff.occupancy.inferer import OctreeInferer
from monai_memeff.occupancy.network import OccupancyNet
from monai_memeff.occupancy.octree import default_stride
from monai_memeff.overlays import overlay_path

POINTS = 2**14
"""Points of a pass and of a step of training: the overlay's."""

SMALL = (64, 96)
"""Longest extents of the volumes on which the octree is measured; up to the larger one the volume itself."""


def is_own(network: nn.Module) -> bool:
    """Whether it is queried at points already."""
    return hasattr(network, "encode") and hasattr(network, "query")


def estimate(question: Question) -> NetworkEstimate:
    """The network of the overlay ``occupancy`` in the place of the given one, or itself if it is queried at points.

    Inference depends on where labels change: the octree is measured around balls, one inside the other for every
    class, the largest half as wide as the volume.

    Raises:
        InputError: the input is not a volume, or a budget is too small.
    """
    network = question.network if is_own(question.network) else _twin(question)
    question = replace(question, network=network)
    if len(question.shape) != 5:
        raise InputError(f"occupancy labels volumes (B, C, H, W, D), got {question.shape}")
    notes = () if question.dense is None else ("a network of its own: it needs training", "overlay occupancy's sizes")
    if question.training:
        found = dry_run(network, question.shape, question.dtype, _training_step(question), True)
        _check(question, found.peak_bytes)
        basis = f"a dry run of every operation, with {POINTS} points"
        return described(question, found, "occupancy", network, basis=basis, notes=notes)
    points, found = _inference(question)
    budget = {} if question.memory_budget is None else {"memory_budget": question.memory_budget}
    setting: dict[str, Any] = {"points_per_pass": points, **budget}
    return described(
        question,
        found,
        "occupancy",
        network,
        basis="a dry run of encoder and points, and the octree as measured around balls in small volumes",
        setting=setting,
        inferer=OctreeInferer(**setting),
        notes=(*notes, "more where labels change in more places than around balls half as wide as the volume"),
    )


def _inference(question: Question) -> tuple[int, DryRun]:
    """Points of a pass, as many as fit, and the peak."""
    shape, item = question.shape, (1, *question.shape[1:])
    tree = _octree(question)
    others = (shape[0] - 1) * math.prod(shape[2:]) * 4 * _classes(question)  # results of the rest of the batch
    points = POINTS
    encoded = dry_run(question.network, item, question.dtype, _encode(question), False)
    latent = sum(t.nbytes for t in tensors_in(encoded.result))
    while True:
        queried = dry_run(question.network, item, question.dtype, _query(question, min(points, tree.call)), False)
        peak = max(encoded.peak_bytes, tree.waiting + queried.peak_bytes, latent + tree.peak) + others
        if question.memory_budget is None or peak <= question.memory_budget or points <= 64:
            break
        points //= 2
    _check(question, peak)
    passes = tree.queried / min(points, tree.call)
    work = encoded.multiplications + passes * (queried.multiplications - encoded.multiplications)
    shown = torch.empty((shape[0], _classes(question), *shape[2:]), device="meta")
    return points, DryRun(peak, round(shape[0] * work), shown)


def _check(question: Question, peak: int) -> None:
    if question.memory_budget is not None and peak > question.memory_budget:
        raise InputError(
            f"occupancy needs {peak} bytes ({in_units(peak)}) for {question.shape} and memory_budget is "
            f"{question.memory_budget}: raise it, or take a smaller volume"
        )


def _twin(question: Question) -> OccupancyNet:
    overlay = json.loads(overlay_path("occupancy").read_text(encoding="utf-8"))
    names = ("channels", "variant")
    arguments = {name: overlay[f"network_def#{name}"] for name in names}
    return OccupancyNet(question.shape[1], question.classes, **arguments).train(question.network.training)


def _classes(question: Question) -> int:
    return int(getattr(question.network, "out_channels", 1))


def _encode(question: Question) -> Callable[[Tensor], Any]:
    network: Any = question.network
    return lambda volume: network.encode(volume)


def _query(question: Question, points: int) -> Callable[[Tensor], Any]:
    network: Any = question.network

    def step(volume: Tensor) -> Any:
        return network.query(network.encode(volume), torch.zeros(1, points, 3, device=volume.device), volume)

    return step


def _training_step(question: Question) -> Callable[[Tensor], Any]:
    def step(volume: Tensor) -> Any:
        batch = len(volume)
        points = torch.zeros(batch, POINTS, 3, device=volume.device)
        output = question.network(volume, points)
        (question.loss or _loss)(output).backward()
        return output

    return step


def _loss(output: Any) -> Tensor:
    logits, coarse = output
    terms = [logits.transpose(1, 2), *([] if coarse is None else [coarse])]
    return torch.stack([_cross_entropy(term.float()) for term in terms]).sum()


def _cross_entropy(logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
    return F.cross_entropy(logits, torch.zeros(len(logits), *logits.shape[2:], dtype=torch.long, device=logits.device))


class _Tree(NamedTuple):
    """The octree around balls: bytes at most, bytes while the network is queried, points queried, and most at once."""

    peak: int
    waiting: int
    queried: int
    call: int


def _octree(question: Question) -> _Tree:
    """The octree of one volume, measured where it is small, else extended from two small ones."""
    extents, classes = question.shape[2:], _classes(question)
    largest = max(extents)
    if largest <= max(SMALL):
        return _measured(extents, classes, default_stride(extents))
    small = [tuple(max(1, round(n * longest / largest)) for n in extents) for longest in SMALL]
    stride, voxels = default_stride(extents), [math.prod(shape) for shape in small]
    found = [_measured(shape, classes, stride) for shape in small]
    return _Tree(*(_extended(voxels, numbers, math.prod(extents)) for numbers in zip(*found, strict=True)))


def _extended(voxels: Sequence[int], values: Sequence[int], whole: int) -> int:
    """A share of the volume and a share of its surface, which two sizes tell apart."""
    (v0, v1), (y0, y1) = voxels, values
    s0, s1 = v0 ** (2 / 3), v1 ** (2 / 3)
    determinant = v0 * s1 - v1 * s0
    of_volume, of_surface = (y0 * s1 - y1 * s0) / determinant, (v0 * y1 - v1 * y0) / determinant
    return max(y1, round(of_volume * whole + of_surface * whole ** (2 / 3)))


def _measured(extents: Sequence[int], classes: int, stride: Sequence[int]) -> _Tree:
    last = torch.tensor([max(1, n - 1) for n in extents], dtype=torch.float32)
    calls: list[tuple[int, int]] = []
    meter = measure_peak()

    def balls(points: Tensor) -> Tensor:
        calls.append((meter.live_bytes, points.shape[1]))
        return _logits_of_balls(points, last, classes)

    volume = torch.zeros(1, 1, *extents)
    inferer = OctreeInferer(points_per_pass=volume.numel(), stride=stride)
    with meter:
        inferer(volume, balls)
    waiting, queried = (list(numbers) for numbers in zip(*calls, strict=True))
    return _Tree(meter.peak_bytes, max(waiting), sum(queried), max(queried))


def _logits_of_balls(points: Tensor, last: Tensor, classes: int) -> Tensor:
    radius = (2 * points / last - 1).norm(dim=-1, keepdim=True)
    if classes == 1:
        return 0.5 - radius
    wanted = (classes * (1 - 2 * radius)).clamp(0, classes - 1)
    return -(torch.arange(classes, device=points.device) - wanted).abs()

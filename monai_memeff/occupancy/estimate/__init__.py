"""What a network of points costs: a dry run of its encoder and of one pass of points, and the octree's own bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.errors import InputError
from monai_memeff.memory.dry import DryRun, dry_run
from monai_memeff.memory.forecast import NetworkEstimate, in_units
from monai_memeff.memory.network import Question, described
from monai_memeff.memory.step import tensors_in
from monai_memeff.occupancy.estimate.boundaries import RULE, Answers, OctreeCost, along_a_mask, around_balls
from monai_memeff.occupancy.inferer import OctreeInferer
from monai_memeff.occupancy.network import OccupancyNet
from monai_memeff.overlays import overlay_path

POINTS = 2**14
"""Points of a pass and of a step of training: the overlay's."""

FEWEST = 1024
"""Points of a pass below which no budget leads: every pass looks up the same features, and takes its time."""


def is_own(network: nn.Module) -> bool:
    """Whether it is queried at points already."""
    return hasattr(network, "encode") and hasattr(network, "query")


def estimate(question: Question) -> NetworkEstimate:
    """The network of the overlay ``occupancy`` in the place of the given one, or itself if it is queried at points.

    Inference depends on where labels change. With an image the octree is that along the border of its active voxels;
    without one the peak is :data:`~monai_memeff.occupancy.estimate.boundaries.RULE`.

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
        basis="a dry run of encoder and points, and the octree as measured "
        + ("around balls" if question.image is None else "along the border of the image's active voxels"),
        setting=setting,
        inferer=OctreeInferer(**setting),
        notes=(*notes, _bound(question)),
    )


def _inference(question: Question) -> tuple[int, DryRun]:
    """Points of a pass, as many as fit, and the peak."""
    shape, item, classes = question.shape, (1, *question.shape[1:]), _classes(question)
    result = math.prod(shape[2:]) * torch.float32.itemsize * classes
    others, joined = (shape[0] - 1) * result, 2 * shape[0] * result if shape[0] > 1 else 0
    encoded = dry_run(question.network, item, question.dtype, _encode(question), False)
    latent, points = sum(t.nbytes for t in tensors_in(encoded.result)), POINTS
    tried = 0 if question.memory_budget is None else 3 * torch.int64.itemsize  # the voxel that a budget is tried with
    tree = _octree(question, Answers(classes, question.dtype, POINTS))
    while True:
        passes = tree.smaller(points).passes
        queried = {n: dry_run(question.network, item, question.dtype, _query(question, n), False) for _, n in passes}
        queries = (waiting + tried + queried[n].peak_bytes for waiting, n in passes)
        peak = max(encoded.peak_bytes, latent + tree.peak_bytes, *queries) + others
        peak = max(peak, joined)
        if question.memory_budget is None or peak <= question.memory_budget or points <= FEWEST:
            break
        points //= 2
    _check(question, peak)
    per_point = max((run.multiplications - encoded.multiplications) / n for n, run in queried.items())
    work = encoded.multiplications + per_point * tree.queried
    shown = torch.empty((shape[0], classes, *shape[2:]), device="meta")
    return points, DryRun(peak, round(shape[0] * work), shown)


def _octree(question: Question, answers: Answers) -> OctreeCost:
    """The octree along the border of the image's active voxels, or around balls."""
    if question.image is None:
        return around_balls(question.shape[2:], answers)
    image = question.image.as_subclass(Tensor)
    if image.dim() != 5 or tuple(image.shape[2:]) != question.shape[2:]:
        raise InputError(
            f"the image (B, C, H, W, D) has the shape {tuple(image.shape)} and the input {question.shape}: give one of"
            " the input's extents"
        )
    return along_a_mask((image[0] != 0).any(0), answers)


def _bound(question: Question) -> str:
    if question.image is None:
        return f"the peak is {RULE}; with an image it is that along the border of its active voxels"
    return "the peak is that of labels whose border is the active voxels'; other borders take other numbers of points"


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

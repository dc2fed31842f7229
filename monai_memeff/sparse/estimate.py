"""What a sparse network costs at the occupancy of an image: measured on windows of it, a line extended from there."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from monai.networks.nets.unet import UNet
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.errors import InputError
from monai_memeff.memory.dry import DryRun, MultiplicationCounter
from monai_memeff.memory.estimate import line_through
from monai_memeff.memory.forecast import NetworkEstimate, in_units
from monai_memeff.memory.meter import measure_peak
from monai_memeff.memory.network import Question, described
from monai_memeff.memory.step import run_step
from monai_memeff.memory.untouched import home
from monai_memeff.sparse.core.activity import active_voxels
from monai_memeff.sparse.inferer import SparseInferer
from monai_memeff.sparse.networks.unet import SparseUNet

ENOUGH = 2**20
"""Voxels of a volume that is measured as it is, and of the largest window of a larger one, about."""

SHARES = (1.0, 0.7, 0.45)
"""Windows, as shares of the longest axis of the largest one."""

WORST = 0.1
"""Deviation from the line from which on nothing is promised."""

ARGUMENTS = (
    *("in_channels", "out_channels", "channels", "strides", "kernel_size", "up_kernel_size", "num_res_units"),
    *("act", "norm", "dropout", "bias", "adn_ordering"),
)
"""What MONAI's UNet keeps of its arguments."""


def is_own(network: nn.Module) -> bool:
    """Whether it computes on active voxels already."""
    return hasattr(network, "sparsify") and hasattr(network, "densify")


def estimate(question: Question) -> NetworkEstimate:
    """MONAI's UNet as a SparseUNet, or the network in question if it is sparse, at the occupancy of the image.

    Windows of the image with its share of active voxels are run for real, with the network's own kernel maps; a small
    image is run as it is. Without an image every voxel is active.

    Raises:
        InputError: another network, an image of other extents, peaks on no line, or a budget that is too small.
    """
    network = question.network if is_own(question.network) else _twin(question)
    question = replace(question, network=network)
    if len(question.shape) != 5:
        raise InputError(f"sparse computes on volumes (B, C, H, W, D), got {question.shape}")
    image = _image(question)
    active = active_voxels(image, getattr(network, "threshold", None), getattr(network, "background", 0.0))
    windows = _windows(active[:, 0].any(0))
    found = [_measured(question, image, window) for window in windows]
    peak, work = _whole(question, [math.prod(s.stop - s.start for s in w) for w in windows], found)
    if question.memory_budget is not None and peak > question.memory_budget:
        raise InputError(
            f"sparse needs {peak} bytes ({in_units(peak)}) for {question.shape} and memory_budget is "
            f"{question.memory_budget}: crop the volume, or take a coarser grid"
        )
    share = float(active.float().mean())
    what = "of the image" if question.image is not None else "without an image: every voxel is active"
    basis = f"measured, {share:.1%} of the voxels active {what}" + ("" if len(windows) == 1 else ", and a line")
    setting = {} if question.memory_budget is None else {"memory_budget": question.memory_budget}
    return described(
        question,
        DryRun(peak, work, torch.empty(_out_shape(question), device="meta")),
        "sparse",
        network,
        basis=basis,
        setting=setting,
        inferer=None if question.training else SparseInferer(**setting),
        notes=_notes(question),
    )


def _notes(question: Question) -> tuple[str, ...]:
    if question.dense is None:
        return ()
    return ("the dense weights load; where voxels are inactive its answers are others, so train it",)


def _twin(question: Question) -> SparseUNet:
    dense: Any = question.network
    if type(dense) is not UNet or dense.dimensions != 3:
        raise InputError(
            f"sparse switches MONAI's UNet for volumes and no other network, got {type(dense).__name__}: take "
            "system='halo', 'clstm' or 'occupancy'"
        )
    try:
        return SparseUNet(3, **{name: getattr(dense, name) for name in ARGUMENTS}).train(dense.training)
    except (ValueError, TypeError) as error:
        raise InputError(f"sparse has no twin of this UNet: {error}") from error


def _out_shape(question: Question) -> tuple[int, ...]:
    classes = question.classes if question.dense is not None else int(getattr(question.network, "out_channels", 1))
    return (question.shape[0], classes, *question.shape[2:])


def _image(question: Question) -> Tensor:
    """The image in the input's batch and channels; ones where there is none, as views without memory."""
    shape, dtype = question.shape, question.dtype
    if question.image is None:
        return torch.ones(1, dtype=dtype).expand(shape)
    image = question.image.as_subclass(Tensor)
    if image.dim() != 5 or tuple(image.shape[2:]) != shape[2:]:
        raise InputError(
            f"the image (B, C, H, W, D) has the shape {tuple(image.shape)} and the input {shape}: give the image that "
            "the network gets, or its shape as the input's"
        )
    return image[:1, :1].to(dtype).expand(shape)


def _windows(active: Tensor) -> list[tuple[slice, ...]]:
    """Boxes of three sizes whose share of active voxels is nearest to that of the whole; the whole if it is small."""
    if active.numel() <= ENOUGH:
        return [tuple(slice(0, n) for n in active.shape)]
    largest = list(active.shape)
    while math.prod(largest) > ENOUGH:
        largest[largest.index(max(largest))] = max(largest) // 2
    longest = largest.index(max(largest))
    sizes = [[max(8, round(n * share)) if k == longest else n for k, n in enumerate(largest)] for share in SHARES]
    return [_nearest(active, size) for size in sizes]


def _nearest(active: Tensor, size: Sequence[int]) -> tuple[slice, ...]:
    step = [max(1, n // 4) for n in size]
    shares = F.avg_pool3d(active[None, None].float(), list(size), step)[0, 0]
    place = int((shares - active.float().mean()).abs().argmin())
    corner = [int(n) for n in torch.unravel_index(torch.tensor(place), shares.shape)]
    return tuple(slice(c * s, c * s + n) for c, s, n in zip(corner, step, size, strict=True))


def _measured(question: Question, image: Tensor, window: tuple[slice, ...]) -> tuple[int, int]:
    """Peak bytes and multiplications of a real step on a window."""
    network = copy.deepcopy(question.network)
    device = home(network)
    volume = image[slice(None), slice(None), window[0], window[1], window[2]].contiguous().to(device)
    with measure_peak(device) as meter, MultiplicationCounter() as counter:
        run_step(network, volume, question.training, question.loss)
    return meter.peak_bytes, counter.multiplications


def _whole(question: Question, voxels: Sequence[int], found: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Peak and multiplications of the whole, on the lines through the windows."""
    if len(found) == 1:
        return found[0]
    peaks, works = (line_through(voxels, [pair[n] for pair in found]) for n in (0, 1))
    if peaks.worst_error > WORST:
        raise InputError(
            f"the peaks of windows of the image, {[peak for peak, _ in found]}, lie on no line: its active voxels are "
            "spread too unevenly; measure_peak around a real step tells"
        )
    extents = question.shape[2:]
    return peaks.peak_bytes(extents), works.peak_bytes(extents)

"""The learned methods that the demo compares: the sparse completion network and a dense MONAI U-Net, equal in time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from monai.networks.nets.unet import UNet
from monai.transforms.utils import get_largest_connected_component_mask
from torch import Tensor, nn

from monai_memeff.apps.skull import RandSkullDefect
from monai_memeff.memory import measure_peak
from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet

THREADS_EVERY = 50
"""Iterations after which the number of threads is chosen anew."""

Progress = Callable[[float, int, float], None]
"""Called after every iteration with the fraction of the time that is spent, the iteration and the loss."""


class CompletionMethod(Protocol):
    """A network that learns to complete a skull."""

    network: nn.Module

    def loss(self, defective: Tensor, skull: Tensor) -> Tensor:
        """Training loss of binary float volumes (B, 1, S, S, S)."""

    def complete(self, defective: Tensor) -> Tensor:
        """Completed skull, bool (B, 1, S, S, S), of a defective one."""


class SparseMethod:
    """:class:`SparseCompletionNet` with its published loss.

    Args:
        weights: state dict to begin with; None: random numbers.
        ignore_index: value of cells in a target that teach nothing.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None, ignore_index: int | None = None) -> None:
        self.network: nn.Module = SparseCompletionNet(ignore_index=ignore_index)
        self.criterion = SparseCompletionLoss(ignore_index)
        if weights is not None:
            self.network.load_state_dict(weights)
        self.network.eval()

    def loss(self, defective: Tensor, skull: Tensor) -> Tensor:
        """Sum of the cross-entropies of six levels."""
        return self.criterion(self.network(defective, skull), skull)

    def complete(self, defective: Tensor) -> Tensor:
        """Voxels with a positive logit."""
        return self.network(defective) > 0


class DenseMethod:
    """MONAI's U-Net, which completes the skull with cross-entropy.

    Of the recipes tried for a few hundred steps (skull or implant as target, cross-entropy with or without Dice, batch
    or instance norm) this one did best by far.
    """

    def __init__(self) -> None:
        self.network: nn.Module = UNet(3, 1, 1, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")
        self.criterion = nn.BCEWithLogitsLoss()

    def loss(self, defective: Tensor, skull: Tensor) -> Tensor:
        """Cross-entropy of the complete skull."""
        return self.criterion(self.network(defective), skull)

    def complete(self, defective: Tensor) -> Tensor:
        """The defective skull and the voxels with a positive logit."""
        return (self.network(defective) > 0) | (defective > 0)


class DefectSampler:
    """Batches of one skull with random defects.

    The published training mirrors half of the skulls from side to side; with a single head, which is what the demo has,
    that only adds a second head to learn, so it is left out.
    """

    def __init__(self, skull: Tensor, seed: int, batch_size: int = 2) -> None:
        self.skull = skull
        self.batch_size = batch_size
        self.defect = RandSkullDefect()
        self.defect.set_random_state(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Defective and complete skulls, float (B, 1, S, S, S)."""
        defective = torch.stack([self.defect(self.skull)[0].as_subclass(Tensor) for _ in range(self.batch_size)])
        return defective, self.skull.as_subclass(Tensor)[None].expand_as(defective)


@dataclass(frozen=True)
class Training:
    """What a training run did."""

    iterations: int
    seconds: float
    final_loss: float


def train(
    method: CompletionMethod,
    sampler: Callable[[], tuple[Tensor, Tensor]],
    seconds: float,
    learning_rate: float,
    progress: Progress | None = None,
    iterations: int | None = None,
) -> Training:
    """Train for a given time, with AdamW and a learning rate that warms up and then falls as a cosine of the time.

    Args:
        method: what to train, in place.
        sampler: gives batches.
        seconds: wall-clock time, at least one iteration.
        learning_rate: the highest one.
        progress: called after every iteration.
        iterations: number of iterations, instead of a time.
    """
    optimizer = torch.optim.AdamW(method.network.parameters(), learning_rate, weight_decay=1e-4)
    method.network.train()
    start, done, loss = time.perf_counter(), 0, math.nan

    def part(now: float) -> float:
        """The fraction of the training that is behind us."""
        return (now - start) / max(seconds, 1e-9) if iterations is None else done / iterations

    def step() -> float:
        """One iteration; returns its own seconds."""
        nonlocal done, loss
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(part(begun))
        value = method.loss(*sampler())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss, done = value.item(), done + 1
        ended = time.perf_counter()
        if progress is not None:
            progress(min(part(ended), 1.0), done, loss)
        return ended - begun

    threads = torch.get_num_threads()
    while part(time.perf_counter()) < 1 or done == 0:
        if done % THREADS_EVERY == 0 and iterations is None:
            keep_faster_threads(step, threads)
        step()
    method.network.eval()
    return Training(done, time.perf_counter() - start, loss)


def keep_faster_threads(step: Callable[[], float], threads: int) -> None:
    """Try one thread and several, and keep what is faster.

    Small kernels in several threads wait for the slowest one, which on a machine with other work can take a hundred
    times longer than one thread alone.

    Args:
        step: does some work and returns the seconds it took.
        threads: how many several are.
    """
    torch.set_num_threads(1)
    single = min(step(), step())
    torch.set_num_threads(threads)
    first = step() if threads > 1 else single
    if first > 2 * single or (first > single and step() > single):
        torch.set_num_threads(1)


def _schedule(fraction: float) -> float:
    """Warm up over a tenth of the time, then a cosine down to one percent."""
    if fraction < 0.1:
        return max(fraction / 0.1, 0.01)
    return max(0.5 * (1 + math.cos(math.pi * (min(fraction, 1.0) - 0.1) / 0.9)), 0.01)


@torch.no_grad()
def implant(method: CompletionMethod, defective: Tensor) -> np.ndarray:
    """The missing piece: the largest connected part of completion minus input.

    Args:
        method: trained, in evaluation mode.
        defective: (1, S, S, S).

    Returns:
        bool (S, S, S).
    """
    defective = defective.as_subclass(Tensor)
    added = method.complete(defective[None])[0, 0] & (defective[0] == 0)
    return get_largest_connected_component_mask(added.numpy())


def peak_bytes(method: CompletionMethod, sampler: Callable[[], tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Peak bytes of live tensors in one training step, and in the completion of one skull."""
    method.network.train()
    defective, complete = sampler()
    with measure_peak() as training:
        method.loss(defective, complete).backward()
    method.network.zero_grad(set_to_none=True)
    method.network.eval()
    with torch.no_grad(), measure_peak() as inference:
        method.complete(defective[:1])
    return training.peak_bytes, inference.peak_bytes

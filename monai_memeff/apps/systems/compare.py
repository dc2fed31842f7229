"""Every system trained on one scan and measured: Dice in hidden slices, peak memory, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from monai.metrics.meandice import compute_dice
from monai.networks.utils import one_hot
from torch import Tensor

from monai_memeff.apps.skull.demo.methods import Progress
from monai_memeff.apps.systems.scan import Scan
from monai_memeff.apps.systems.systems import (
    CLSTMSystem,
    DenseSystem,
    HaloSystem,
    OccupancySystem,
    SegmentationSystem,
    SparseSystem,
)
from monai_memeff.memory import measure_peak

ShowProgress = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class SystemResult:
    """What one system did.

    Attributes:
        name: "dense", "sparse", "occupancy", "clstm" or "halo".
        labels: uint8 (H, W, D), its answer.
        dice: one number for each class, in the hidden slices; None where the class is not in them.
        iterations: training steps; 0 for halo, which runs the dense network.
        planned: training steps that were planned; fewer were made where the time was up.
        train_seconds: time of the training.
        parameters: number of trained numbers.
        train_peak_bytes: peak of live tensor bytes in one training step; None for halo.
        test_peak_bytes: peak of live tensor bytes on the device while the whole scan is labeled.
        store_bytes: bytes of whole tensors that wait in host memory meanwhile; 0 but for halo.
        test_seconds: time to label the whole scan.
        different: voxels with another label than the dense network gives, for halo; else None.
    """

    name: str
    labels: Tensor
    dice: tuple[float | None, ...]
    iterations: int
    planned: int
    train_seconds: float
    parameters: int
    train_peak_bytes: int | None
    test_peak_bytes: int
    store_bytes: int
    test_seconds: float
    different: int | None = None

    @property
    def mean_dice(self) -> float | None:
        """Mean over the classes that are in the hidden slices; None where none is."""
        known = [value for value in self.dice if value is not None]
        return sum(known) / len(known) if known else None


def compare(
    scan: Scan, seconds: float, seed: int, show: ShowProgress, iterations: int | None = None
) -> list[SystemResult]:
    """Train and measure all systems.

    Args:
        scan: the scan.
        seconds: most seconds of training for each system.
        seed: seed of weights and drawn points; the same seed gives the same numbers where no time runs out.
        show: gives a progress callback for a training with a name.
        iterations: training steps of every system; None: as many as each is made for.
    """
    dense, results = None, []
    builders: list[Callable[[], SegmentationSystem]] = [
        lambda: DenseSystem(scan), lambda: SparseSystem(scan), lambda: OccupancySystem(scan, seed),
        lambda: CLSTMSystem(scan),
    ]  # fmt: skip
    for build in builders:
        torch.manual_seed(seed)
        system = build()
        planned = iterations or system.iterations
        with show(system.title) as progress:
            done, spent = train(system, scan, planned, seconds, progress)
        results.append(_measure(system, scan, done, planned, spent))
        dense = dense or system
    assert dense is not None
    results.append(_measure_halo(HaloSystem(dense.network, scan), scan, results[0].labels))
    return results


def train(
    system: SegmentationSystem, scan: Scan, iterations: int, seconds: float, progress: Progress
) -> tuple[int, float]:
    """Train for a number of steps, or until the time is up; Adam, a rate that falls as a cosine.

    Returns:
        Steps made, and seconds.
    """
    optimizer = torch.optim.Adam(system.network.parameters(), system.learning_rate)
    system.network.train()
    start, done, part = time.perf_counter(), 0, 0.0
    while done < iterations and (part < 1 or done == 0):
        for group in optimizer.param_groups:
            group["lr"] = system.learning_rate * max(0.02, 0.5 * (1 + math.cos(math.pi * part)))
        loss = system.loss(scan)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1
        part = min(1.0, max(done / iterations, (time.perf_counter() - start) / seconds))
        progress(part, done, loss.item())
    system.network.eval()
    return done, time.perf_counter() - start


def _measure(system: SegmentationSystem, scan: Scan, done: int, planned: int, spent: float) -> SystemResult:
    system.network.train()
    with measure_peak() as training:
        system.loss(scan).backward()
    system.network.zero_grad(set_to_none=True)
    system.network.eval()
    labels, peak, seconds = _label(system, scan)
    return SystemResult(
        name=system.title, labels=labels, dice=hidden_dice(labels, scan), iterations=done, planned=planned,
        train_seconds=spent, parameters=sum(p.numel() for p in system.network.parameters()),
        train_peak_bytes=training.peak_bytes, test_peak_bytes=peak, store_bytes=0, test_seconds=seconds,
    )  # fmt: skip


def _measure_halo(system: HaloSystem, scan: Scan, dense: Tensor) -> SystemResult:
    system.network.eval()
    labels, _, seconds = _label(system, scan)
    report = system.inferer.last_report
    assert report is not None
    return SystemResult(
        name=system.title, labels=labels, dice=hidden_dice(labels, scan), iterations=0, planned=0, train_seconds=0.0,
        parameters=sum(p.numel() for p in system.network.parameters()), train_peak_bytes=None,
        test_peak_bytes=report.device_peak_bytes, store_bytes=report.store_bytes, test_seconds=seconds,
        different=int((labels != dense).sum()),
    )  # fmt: skip


@torch.no_grad()
def _label(system: SegmentationSystem, scan: Scan) -> tuple[Tensor, int, float]:
    """Labels, peak bytes and seconds; timed apart from the measurement of memory, which takes time itself."""
    with measure_peak() as meter:
        labels = system.labels(scan)
    start = time.perf_counter()
    system.labels(scan)
    return labels, meter.peak_bytes, time.perf_counter() - start


def hidden_dice(labels: Tensor, scan: Scan) -> tuple[float | None, ...]:
    """Dice of every class in the hidden slices; None where the class is not in them."""
    found, truth = (
        one_hot(volume[scan.hidden].long()[None, None, :], scan.classes, dim=1) for volume in (labels, scan.target)
    )
    values = compute_dice(found, truth, include_background=False, ignore_empty=True)[0].tolist()
    return tuple(None if math.isnan(value) else float(value) for value in values)

"""Labels from logits that come a few classes at a time: a running arg-max, or regions one over the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from nnunet_plugins.lean.predict.window import BLOCK


class RunningArgmax:
    """The index of the largest value over classes; as in numpy the first of equals, and the first NaN before all.

    Args:
        shape: (X, Y, Z).
        dtype: Of the labels.
    """

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        self.labels = np.zeros(shape, dtype)
        self.best: torch.Tensor | None = None

    def add(self, number: int, values: np.ndarray) -> None:
        """Take the values (X, Y, Z) of class ``number``; classes come in order."""
        new = torch.from_numpy(np.ascontiguousarray(values)).flatten()
        if self.best is None:
            self.best = new.clone()
            return
        labels, label = self.labels.reshape(-1), np.int64(number).astype(self.labels.dtype)
        step = BLOCK // 16
        with one_thread():
            for first in range(0, new.numel(), step):
                part, best = new[first : first + step], self.best[first : first + step]
                larger = part > best
                if part.sum(dtype=torch.float32).isnan():  # a NaN, or infinities of both signs
                    larger |= part.isnan() & ~best.isnan()
                torch.maximum(part, best, out=best)  # NaN where one of them is
                found = labels[first : first + step]
                np.maximum(found, np.multiply(larger.numpy(), label, dtype=found.dtype), out=found)  # the largest yet


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: work this short costs others more in waiting for each other than it takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class RegionsInOrder:
    """The label of the last region, in nnU-Net's order, whose probability is above one half.

    Args:
        shape: (X, Y, Z).
        dtype: Of the labels.
        order: Label of every region (``regions_class_order``).
        nonlin: From logits to probabilities.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, order: Sequence[int], nonlin: Callable[..., Any]) -> None:
        self.labels = np.zeros(shape, dtype)
        self.order, self.nonlin = order, nonlin

    def add(self, number: int, values: np.ndarray) -> None:
        """Take the logits (X, Y, Z) of a region."""
        if number >= len(self.order):
            return
        label = np.uint16(self.order[number]).astype(self.labels.dtype)
        logits = torch.from_numpy(np.ascontiguousarray(values)).flatten()
        labels, step = self.labels.reshape(-1), BLOCK // 16
        for first in range(0, logits.numel(), step):
            inside = self.nonlin(logits[first : first + step].float()) > 0.5
            np.copyto(labels[first : first + step], label, where=inside.numpy())


def label_type(label_manager: Any) -> Any:
    """Type of nnU-Net's label maps."""
    return np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16


def labels_of(volumes: Iterator[np.ndarray], label_manager: Any) -> np.ndarray:
    """The label map (X, Y, Z) of logits that come as (1, X, Y, Z), class after class."""
    first = next(volumes)
    shape, dtype = first.shape[1:], label_type(label_manager)
    labeler: RunningArgmax | RegionsInOrder = RunningArgmax(shape, dtype)
    if label_manager.has_regions:
        labeler = RegionsInOrder(shape, dtype, label_manager.regions_class_order, label_manager.inference_nonlin)
    labeler.add(0, first[0])
    del first
    for number, volume in enumerate(volumes, 1):
        labeler.add(number, volume[0])
        del volume  # before the next one is made
    return labeler.labels

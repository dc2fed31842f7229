"""Probabilities of whole label sets on disk, with the bits that torch gives for them in one piece.

Torch computes softmax and sigmoid of most values with vector instructions and of a few left over at the end of every
thread's share with others, whose last bit may differ. So pieces are cut at the borders of those shares, in multiples
of a vector's length; a trial decides once whether that reproduces this torch, and otherwise nothing is cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.helpers import softmax_helper_dim0

from nnunet_plugins.lean.predict.files import ScratchFile
from nnunet_plugins.lean.predict.window import BLOCK

STEP = 64
"""Values that make whole vectors for every instruction set, twice."""

GRAIN = 32768
"""Fewest values that torch gives a thread in an elementwise function."""


class ProbabilityFile:
    """Values (C, N) in single precision on disk, class after class.

    Args:
        classes: Number of classes or regions.
        shape: (X, Y, Z).
    """

    def __init__(self, classes: int, shape: Sequence[int]) -> None:
        self.classes, self.shape, self.voxels = classes, tuple(shape), math.prod(shape)
        self.file = ScratchFile(4 * classes * self.voxels)

    def write_class(self, number: int, values: np.ndarray) -> None:
        """Write the values (X, Y, Z) of a class, in any type that single precision holds."""
        flat = np.ascontiguousarray(values).reshape(-1)
        step = BLOCK // 4
        for first in range(0, self.voxels, step):
            part = flat[first : first + step].astype(np.float32)
            self.file.write(4 * (number * self.voxels + first), part)

    def read_class(self, number: int) -> np.ndarray:
        """Values (X, Y, Z) of a class."""
        return self.file.read(4 * number * self.voxels, np.empty(self.shape, np.float32))

    def softmax(self, threads: int) -> None:
        """Replace logits by probabilities over the classes."""
        size = max(STEP, BLOCK // (8 * self.classes) // STEP * STEP)
        for first, stop in pieces(self.voxels, threads, size):
            values = np.empty((self.classes, stop - first), np.float32)
            for number in range(self.classes):
                self.file.read(4 * (number * self.voxels + first), values[number])
            result = torch.softmax(torch.from_numpy(values), 0).numpy()
            for number in range(self.classes):
                self.file.write(4 * (number * self.voxels + first), result[number])

    def sigmoid(self, threads: int) -> None:
        """Replace every logit by its probability."""
        count = self.classes * self.voxels
        for first, stop in pieces(count, min(threads, math.ceil(count / GRAIN)), BLOCK // 4):
            values = self.file.read(4 * first, np.empty(stop - first, np.float32))
            self.file.write(4 * first, torch.sigmoid(torch.from_numpy(values)).numpy())


def pieces(count: int, threads: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` values into pieces of at most ``size`` that end where the share of one of ``threads`` ends."""
    share = max(1, math.ceil(count / max(threads, 1)))
    for begin in range(0, count, share):
        end = min(begin + share, count)
        for first in range(begin, end, size):
            yield first, min(first + size, end)


def apply(file: ProbabilityFile, label_manager: Any, threads: int) -> None:
    """Turn logits on disk into probabilities, as nnU-Net with ``threads`` threads does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (file.sigmoid if label_manager.inference_nonlin is torch.sigmoid else file.softmax)(threads)
    finally:
        torch.set_num_threads(before)


@functools.cache
def reproduces(regions: bool, threads: int) -> bool:
    """Whether pieces give the bits of the whole with this torch and number of threads."""
    values = (8 * torch.randn(3, 9 * GRAIN + 77, generator=torch.Generator().manual_seed(0))).half().float()
    file = ProbabilityFile(3, values.shape[1:])
    for number, part in enumerate(values):
        file.write_class(number, part.numpy())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    whole = torch.sigmoid(values) if regions else softmax_helper_dim0(values)
    torch.set_num_threads(1)
    (file.sigmoid if regions else file.softmax)(threads)
    torch.set_num_threads(before)
    return all(np.array_equal(file.read_class(n), whole[n].numpy()) for n in range(3))

"""Clouds of points for the tests of this folder, and a plain reference that merges cells with dictionaries."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor

from monai_memeff.sparse.points import Data


def cloud(count: int = 60, seed: int = 0, clouds: int = 1, spread: float = 6.0) -> Data:
    """Points around the origin in float64, with features, labels, and a batch index where there are several clouds."""
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randn(count, 3, generator=generator, dtype=torch.float64) * torch.tensor([spread, spread / 2, spread])
    data = Data(
        pos,
        x=torch.randn(count, 2, generator=generator, dtype=torch.float64),
        y=torch.randint(-1, 3, (count,), generator=generator),
        batch=torch.arange(count) % clouds if clouds > 1 else None,
    )
    data.heat = torch.rand(count, generator=generator, dtype=torch.float64)
    data.note = "kept"
    return data


def members(data: Data, size: float) -> dict[tuple[int, ...], list[int]]:
    """Rows of every cell (batch, i, j, k), in lexicographic order of the cells."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, place in enumerate(data.pos.tolist()):
        batch = 0 if data.batch is None else int(data.batch[row])
        found[(batch, *(round(p / size) for p in place))].append(row)
    return dict(sorted(found.items()))


def majority(labels: Tensor) -> int:
    """The most frequent label, the smallest of equals."""
    votes = Counter(labels.tolist())
    return min(votes, key=lambda label: (-votes[label], label))

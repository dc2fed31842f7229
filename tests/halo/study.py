"""One network of the matrix in many settings: exact everywhere, or refused by module and operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from monai_memeff.halo import plan
from tests.halo.matrix import Entry
from tests.halo.partitioned import Setting, Tally, one_capture, try_settings

DOUBLE, SINGLE = 1e-9, 2e-4  # of the largest value; the bound for float32 is for twenty layers and more


@dataclass
class Row:
    """What became of a network.

    Attributes:
        exact: number of settings that equal the whole.
        refused: the reasons, each once.
        whole: operators that ran on the whole volume.
    """

    exact: int
    refused: list[str]
    whole: list[str]


def settings_of(entry: Entry) -> list[Setting]:
    """Every axis, and 2, 3 and 8 parts."""
    last = len(entry.shape) - 3
    if entry.big:
        return [(0, 3), (last, 2)]
    return [(0, 2), (0, 8), *[(axis, 3) for axis in range(last)], (last, 8)]


def study(entry: Entry, folder: Path, settings: list[Setting] | None = None, more: bool = True) -> Row:
    """Run a network in all settings, in host memory; in a folder, with a batch of two and in float32 once each.

    Args:
        entry: of the matrix.
        folder: for the mapped files.
        settings: axes and parts; by default all.
        more: whether the other store, batch and type are tried.
    """
    network, args, tally = entry.network(), entry.arguments(), Tally()
    chosen = settings_of(entry) if settings is None else settings
    double = DOUBLE if entry.dtype == torch.float64 else SINGLE
    try_settings(network, args, chosen, tolerance=double, tally=tally)
    if more and tally.exact and not entry.big:
        try_settings(network, args, [(0, 3)], tolerance=double, tally=tally, store=folder)
        try_settings(network, entry.arguments(batch=2), [(0, 3)], tolerance=double, tally=tally)
        single = tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        try_settings(network.float(), single, [(0, 3)], tolerance=SINGLE, tally=tally)
        network.to(entry.dtype)
    whole: list[str] = []
    if tally.exact:
        with one_capture():
            whole = sorted({w.rsplit(": ", 1)[1] for w in plan(network, args, partitions=3).whole_operators()})
    return Row(tally.exact, list(dict.fromkeys(tally.refused)), whole)

"""Neighbor tables kept on disk: a fixed data set finds its neighbors once, not once in every epoch."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.data.atomic import atomic_write
from monai_memeff.sparse.core.neighbors import KernelShape, NeighborTable
from monai_memeff.sparse.core.voxel_set import VoxelSet

MIN_VOXELS = 2**12
"""Smaller sets are planned faster than a file is opened."""

VERSION = 1
"""Of the files; part of their names."""

_folder: Path | None = None
_max_bytes = 0


@numbers_checked
def keep_kernel_maps(folder: str | os.PathLike[str] | None, max_bytes: int = 20 * 2**30) -> None:
    """Keep the neighbors that convolutions find in a folder, and read them there when the same voxels come back.

    For data that come back unchanged: validation, inference, training without random transforms. With random ones the
    voxels differ every time, and nothing would be found again. A file is named by a digest of the voxels and the
    kernel's shape, so different data may share a folder, and processes too; damaged files are planned anew.

    Args:
        folder: made if it is not there; None: keep nothing, as before the first call.
        max_bytes: no file is added that would let the folder hold more; a voxel takes up to 40 bytes per 3^3 kernel.

    Sets of fewer than 4096 voxels are not kept: they are planned faster than a file is opened.

    Raises:
        ValueError: ``max_bytes`` is negative.
        OSError: the folder cannot be made.

    Examples:
        >>> keep_kernel_maps("maps")  # for this process, from now on
        >>> keep_kernel_maps(None)
    """
    global _folder, _max_bytes
    if max_bytes < 0:
        raise ValueError(f"max_bytes must not be negative, got {max_bytes}; use folder=None to keep nothing.")
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    _folder, _max_bytes = None if folder is None else Path(folder), max_bytes


def load_cached(
    inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape, plan: Callable[[], NeighborTable]
) -> NeighborTable:
    """The table from the folder, if one is used and has it, else as planned, which is then written there."""
    if _folder is None or max(len(inputs), len(outputs)) < MIN_VOXELS:
        return plan()
    path = _folder / f"{_digest(inputs, outputs, shape)}.v{VERSION}.pt"
    table = _read(path, inputs.device)
    if table is None:
        table = plan()
        _write(path, table)
    return table


def _digest(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> str:
    digest = hashlib.blake2b(repr((shape, inputs.spatial_shape, outputs.spatial_shape, inputs.batch_size)).encode())
    for voxels in (inputs,) if outputs is inputs else (inputs, outputs):
        digest.update(voxels.keys.cpu().numpy().data)
        digest.update(b"|")
    return digest.hexdigest()[:40]


def _read(path: Path, device: torch.device) -> NeighborTable | None:
    try:
        with ZipFile(path) as file:
            if file.testzip() is not None:  # torch compares no checksums, and a wrong row is a wrong result
                return None
        found = torch.load(path, map_location=device, weights_only=True)
        return NeighborTable(found["entries"], found["window"], found["slots"], found["absent"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, BadZipFile, pickle.UnpicklingError):
        return None


def _write(path: Path, table: NeighborTable) -> None:
    """Write all or nothing; a full or read-only folder is not a reason to stop."""
    kept: dict[str, Tensor | int | None] = vars(table)
    size = sum(value.nbytes for value in kept.values() if isinstance(value, Tensor))
    try:
        held = sum(file.stat().st_size for file in path.parent.glob("*.pt"))
        if size + held > _max_bytes:
            return
        with atomic_write(path) as work:
            torch.save(kept, work)
            if os.path.getsize(work) + held > _max_bytes:  # the file's own frame included
                raise OSError("the folder is full")
    except (OSError, RuntimeError):
        return

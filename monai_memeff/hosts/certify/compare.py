"""Two results beside each other: labels that differ, the largest difference of logits, Dice, and a result's hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from monai_memeff.errors import InputError

BLOCK = 2**24
"""Values that are compared at once: a difference of large volumes takes no memory of their size."""


@dataclass(frozen=True)
class Difference:
    """How far a result is from the reference.

    Attributes:
        voxels: whose label differs.
        of: voxels of the image.
        largest: largest difference of two logits.
        scale: largest absolute logit of the reference.
        identical: whether every bit is the same.
    """

    voxels: int
    of: int
    largest: float
    scale: float
    identical: bool


def differing(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Where labels differ, (H, W, D); where segments overlap, in any of them.

    Raises:
        InputError: the two are of different shapes.
    """
    if labels.shape != reference.shape:
        raise InputError(f"two runs of one model gave labels of {labels.shape} and {reference.shape} voxels")
    different = labels != reference
    return different.any(0) if different.ndim == 4 else different


def difference(answer: Any, reference: Any, where: np.ndarray) -> Difference:
    """Compare two results.

    Args:
        answer: tensors, in whatever a network returns.
        reference: The same, of the run that is right.
        where: :func:`differing` of their labels.
    """
    largest, scale, identical = 0.0, 0.0, True
    for ours, theirs in zip(tensors(answer), tensors(reference), strict=True):
        if ours.shape != theirs.shape:
            raise InputError(f"two runs of one network gave {tuple(ours.shape)} and {tuple(theirs.shape)}")
        for a, b in zip(ours.reshape(-1).split(BLOCK), theirs.reshape(-1).split(BLOCK), strict=True):
            identical &= torch.equal(a, b)
            largest = max(largest, float((a.double() - b.double()).abs().max()))
            scale = max(scale, float(b.double().abs().max()))
    return Difference(int(np.count_nonzero(where)), int(where.size), largest, scale, identical)


def require_finite(answer: Any, what: str) -> None:
    """Refuse values with which nothing can be compared.

    Raises:
        InputError: some are NaN or infinite.
    """
    wrong = 0
    for tensor in tensors(answer):
        if tensor.is_floating_point():
            wrong += sum(int((~block.isfinite()).sum()) for block in tensor.reshape(-1).split(BLOCK))
    if wrong:
        raise InputError(f"{what} {wrong} values that are NaN or infinite, and such values have no label")


def digest(answer: Any) -> str:
    """SHA-256 of all tensors of a result, with their shapes and types."""
    found = hashlib.sha256()
    for tensor in tensors(answer):
        found.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        for block in tensor.contiguous().reshape(-1).split(BLOCK):
            found.update(block.view(torch.uint8).numpy().data)
    return found.hexdigest()


def state_digest(network: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers of a network, with their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name} {digest(tensor.detach().cpu())};".encode())
    return found.hexdigest()


def dice(labels: np.ndarray, truth: np.ndarray, classes: Mapping[str, tuple[int, ...]]) -> dict[str, float | None]:
    """Dice of every class; None where neither the labels nor the truth have it.

    Args:
        labels: (H, W, D), or (S, H, W, D) where segments overlap.
        truth: True segmentation, likewise; with segments, above 0 is inside.
        classes: name -> numbers of its voxels, or (index of the segment,).
    """
    found: dict[str, float | None] = {}
    for name, numbers in classes.items():
        if labels.ndim == 4:
            ours, theirs = labels[numbers[0]] > 0, truth[numbers[0]] > 0
        else:
            ours, theirs = np.isin(labels, numbers), np.isin(truth, numbers)
        total = int(ours.sum()) + int(theirs.sum())
        found[name] = None if total == 0 else 2 * int(np.logical_and(ours, theirs).sum()) / total
    return found


def tensors(answer: Any) -> list[Tensor]:
    """The tensors of a result, plain and on the CPU."""
    return [leaf.as_subclass(Tensor).cpu() for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]

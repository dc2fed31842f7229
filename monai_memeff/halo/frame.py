"""Extents that a network takes, for volumes of others: zeros around the volume; results cropped, with its meta data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.memory.dry import DryRun, dry_run
from monai_memeff.memory.step import tensors_in

DIVISORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of which the extents of a volume may have to be multiples, for networks that halve them."""

Extents = tuple[int, ...]


def extents_taken(extents: Sequence[int], attempt: Callable[[Extents], DryRun | None]) -> tuple[Extents, DryRun | None]:
    """The volume's own extents where the network takes them and gives them back, else the next multiples it does.

    A network that halves stops at odd extents where it joins levels, or rounds them up: it takes 15 voxels and returns
    16, none of them the volume's. A network that gives other extents back at every multiple is left its first ones.

    Args:
        extents: spatial extents of the volume.
        attempt: extents -> a dry run of the network there; None where it does not take them.

    Returns:
        The extents and their dry run; the volume's own and None, where the network takes none of the multiples.
    """
    own, taken = tuple(extents), list[tuple[Extents, DryRun]]()
    for divisor in DIVISORS:
        size = tuple(-(-extent // divisor) * divisor for extent in own)
        found = attempt(size)
        if found is None:
            continue
        taken.append((size, found))
        if all(tuple(tensor.shape[2:]) == size for tensor in list(tensors_in(found.result))[:1]):
            return taken[-1]
    return taken[0] if taken else (own, None)


def attempt_dry(network: nn.Module, leading: Extents, dtype: torch.dtype) -> Callable[[Extents], DryRun | None]:
    """Dry runs of a network in inference, for :func:`extents_taken`.

    Args:
        network: not changed.
        leading: batch and channels.
        dtype: the volume's number type.
    """

    def attempt(size: Extents) -> DryRun | None:
        try:
            return dry_run(network, (*leading, *size), dtype, network, False)
        except Exception:  # of the network, of any kind: the run itself says it in words
            return None

    return attempt


def around(own: Sequence[int], size: Sequence[int]) -> list[int]:
    """Zeros before and after each axis, last axis first, as `torch.nn.functional.pad` takes them."""
    more = [new - old for old, new in zip(own, size, strict=True)]
    return [part for extra in reversed(more) for part in (extra // 2, extra - extra // 2)]


def cropped(answer: Any, own: Sequence[int], size: Sequence[int]) -> Any:
    """A result without the zeros around.

    Args:
        answer: what the network returned for a padded volume.
        own: extents of the volume.
        size: extents with the zeros.

    Raises:
        NotPartitionableError: if a tensor of it has other extents, so that nothing says which voxels are the volume's.
    """
    first = [(new - old) // 2 for old, new in zip(own, size, strict=True)]
    inside = (..., *(slice(start, start + old) for start, old in zip(first, own, strict=True)))

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if tuple(leaf.shape[2:]) != tuple(size):
            raise NotPartitionableError(
                f"the network takes {tuple(own)} voxels only with zeros around, as {tuple(size)}, and returns a tensor"
                f" of shape {tuple(leaf.shape)} that cannot be cropped to them: give a volume of {tuple(size)}"
            )
        return leaf[inside].contiguous()

    return pytree.tree_map(one, answer)


def with_meta(output: Any, inputs: Tensor) -> Any:
    """Give the tensors of an output the meta data of a MONAI MetaTensor, so that transforms can be inverted."""
    if not isinstance(inputs, MetaTensor):
        return output

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = MetaTensor(leaf)
        tensor.copy_meta_from(inputs)
        tensor.is_batch = inputs.is_batch
        return tensor

    return pytree.tree_map(one, output)

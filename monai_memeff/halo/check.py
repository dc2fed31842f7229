"""Proves on a small volume that a network's parts equal the whole, by the path that the inferer takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils import _pytree as pytree

from monai_memeff.arguments import numbers_checked
from monai_memeff.halo.inferer import SpatialPartitionInferer
from monai_memeff.halo.planning.capture import require_capturable
from monai_memeff.halo.planning.errors import NotPartitionableError


@numbers_checked
def verify(
    network: nn.Module, shape: Sequence[int], partitions: int = 3, axis: int = 0, tolerance: float = 1e-8
) -> float:
    """The largest error of the partitioned network over its largest value, on a random volume in float64.

    A copy of the network, in its training or evaluation mode, is run whole and by `SpatialPartitionInferer`.

    Args:
        network: not changed.
        shape: input shape (B, C, spatial...).
        partitions: number of parts.
        axis: spatial axis that is cut.
        tolerance: largest error allowed.

    Raises:
        NotPartitionableError: if the network cannot be partitioned, or the error exceeds the tolerance.

    Examples:
        >>> verify(torch.nn.Conv3d(1, 2, 3, padding=1), (1, 1, 9, 8, 8)) < 1e-12
        True
    """
    require_capturable(network)
    whole = copy.deepcopy(network).to("cpu", torch.float64)
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = SpatialPartitionInferer(partitions, axis=axis)(x.clone(), whole)
    with torch.no_grad():
        expected = whole(x)
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(b, torch.Tensor) and b.numel():
            if a.shape != b.shape:
                raise NotPartitionableError(f"the parts give {tuple(a.shape)} but the whole {tuple(b.shape)}")
            worst = max(worst, float((a - b).double().abs().max() / b.double().abs().max().clamp_min(1e-300)))
    if not worst <= tolerance:
        raise NotPartitionableError(f"parts differ from the whole by {worst:.2e}, allowed {tolerance:.0e}")
    return worst

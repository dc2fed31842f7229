"""Proves on a small volume that a network's parts equal the whole, by the path that the inferer takes."""

from __future__ import annotations

import copy
import math
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
        if isinstance(b, torch.Tensor):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise NotPartitionableError(f"the parts give {_kind(a)} but the whole {_kind(b)}")
            worst = max(worst, _error(a, b))
    if not worst <= tolerance:
        raise NotPartitionableError(f"parts differ from the whole by {worst:.2e}, allowed {tolerance:.0e}")
    return worst


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value; infinite where other values are infinite or no numbers."""
    if not b.numel():
        return 0.0
    a, b = (torch.view_as_real(t) if t.is_complex() else t.double() for t in (a, b))
    if any(not torch.equal(a == special, b == special) for special in (math.inf, -math.inf)):
        return math.inf
    if not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    a, b = (t.nan_to_num(0.0, 0.0, 0.0) for t in (a, b))
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))

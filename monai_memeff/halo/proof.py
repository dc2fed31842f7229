"""Proves once, on a small volume and in virtual ranks, that the parts of a network equal the whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from monai_memeff.halo import region as registry
from monai_memeff.halo.guard import tensors_in
from monai_memeff.halo.mesh import virtual_mesh
from monai_memeff.halo.network import is_partitioned, replica, spatial_partition, unpartition
from monai_memeff.halo.region import NotPartitionable
from monai_memeff.halo.virtual import Hub
from monai_memeff.halo.volume import gather, scatter


def _loss(output: Any) -> torch.Tensor:
    """A sum over voxels that weighs every voxel differently enough to show an error."""
    return sum((t * t.detach().tanh()).sum() for t in tensors_in(output))


def verify(
    network: nn.Module,
    shape: Sequence[int],
    spatial: Sequence[int] = (2,),
    axes: Sequence[int] | None = None,
    tolerance: float = 1e-8,
) -> float:
    """Prove on a small random volume that the parts equal the whole: forward and parameter gradients, in float64.

    Runs a copy of the network as virtual ranks in this process, with dropout off; call it once per architecture.

    Args:
        network: partitioned or not; it is not changed.
        shape: input shape (B, C, spatial...).
        spatial: parts along each split axis.
        axes: which spatial axes are split; by default the first ones.
        tolerance: largest error allowed, relative to the largest value.

    Returns:
        The largest relative error found.

    Raises:
        NotPartitionable: if a layer or a call is not in the table, or if the error exceeds the tolerance.
    """
    whole = unpartition(copy.deepcopy(network)) if not is_partitioned(network) else _restored_copy(network)
    whole = whole.to("cpu", torch.float64)
    for module in whole.modules():
        if "Dropout" in type(module).__name__:
            module.eval()
    parts = copy.deepcopy(whole)
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = whole(x)
    _loss(expected).backward()
    hub = Hub(math.prod(spatial))
    mesh = virtual_mesh(hub, spatial, axes)
    spatial_partition(parts, mesh)
    ranks = [replica(parts, share_buffers=False) for _ in range(hub.size)]

    def work(rank: int) -> Any:
        output = ranks[rank](scatter(x, mesh))
        _loss(output).backward()
        return gather(output, mesh)

    error = _difference(list(tensors_in(expected)), list(tensors_in(hub.run(work)[0])), "output")
    pairs = [
        (a.grad, b.grad, n)
        for (n, a), b in zip(whole.named_parameters(), parts.parameters(), strict=False)
        if a.grad is not None
    ]
    scale = max((float(a.abs().max()) for a, _, _ in pairs), default=1.0)
    grads = [(float((a - b).abs().max()) / scale if b is not None else math.inf, n) for a, b, n in pairs]
    worst, name = max([(error, "output"), *grads])
    if not worst <= tolerance:
        raise NotPartitionable(f"Parts differ from the whole by {worst:.2e} (allowed {tolerance:.0e}) at '{name}'.")
    return worst


def _restored_copy(network: nn.Module) -> nn.Module:
    """An unpartitioned copy that leaves the registry alone."""
    kept = dict(registry._KEEP)
    whole = unpartition(copy.deepcopy(network))
    registry._KEEP.update(kept)
    return whole


def _difference(expected: list[torch.Tensor], got: list[torch.Tensor], name: str) -> float:
    if [t.shape for t in expected] != [t.shape for t in got]:
        raise NotPartitionable(
            f"The {name} has shapes {[tuple(t.shape) for t in got]} in parts, but "
            f"{[tuple(t.shape) for t in expected]} whole."
        )
    pairs = [(a.detach(), b.detach()) for a, b in zip(expected, got, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) for a, b in pairs)

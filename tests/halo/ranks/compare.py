"""A training step of a network in parts beside the step of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from monai_memeff.halo import gather, scatter, spatial_partition
from monai_memeff.halo.planning.capture import capture as plain_capture
from monai_memeff.halo.run.ranks import partition
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.parts import mark, part_of
from tests.halo.ranks.threads import run_ranks


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of a nested output."""
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]


def weighed(output: Any) -> torch.Tensor:
    """A sum over voxels that weighs every voxel differently enough to show an error."""
    return sum((t * (t.detach().tanh() + 0.3)).sum() for t in tensors(output))  # type: ignore[return-value]


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name, of those parameters that have one."""
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def distance(a: torch.Tensor, b: torch.Tensor, scale: float | None = None) -> float:
    """Largest difference relative to the largest value; infinite where only one of them is not a number."""
    assert a.shape == b.shape, (a.shape, b.shape)
    if a.numel() == 0:
        return 0.0
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.double().nan_to_num(0.0), b.double().nan_to_num(0.0)
    return float((a - b).abs().max()) / (scale or max(float(a.abs().max()), 1e-300))


@contextmanager
def captured_once() -> Iterator[None]:
    """Ranks of one process share what they capture alike; processes capture each for itself."""
    found: dict[Any, Any] = {}

    def capture(network: nn.Module, args: Any, kwargs: Any) -> Any:
        shapes = [tuple(t.shape) if isinstance(t, torch.Tensor) else t for t in tree_leaves((args, kwargs))]
        key = (str(shapes), network.training)
        if key not in found:
            found[key] = plain_capture(network, args, kwargs)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "capture", capture)
        yield


def errors_of(
    network: nn.Module,
    inputs: Sequence[torch.Tensor],
    spatial: Sequence[int] = (2,),
    axes: Sequence[int] | None = None,
    share: Callable[[torch.Tensor, HaloMesh], torch.Tensor] = scatter,
    **options: Any,
) -> dict[str, float]:
    """Largest relative errors of output, gradients of parameters and inputs, and buffers, in parts."""
    whole = copy.deepcopy(network)
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    expected = whole(*leaves)
    weighed(expected).backward()

    def work(mesh: HaloMesh) -> tuple[Any, ...]:
        mine = spatial_partition(copy.deepcopy(network), mesh, **options)
        parts = [share(x, mesh) if x.dim() > 2 else x for x in inputs]
        parts = [p.requires_grad_(p.is_floating_point()) for p in parts]
        output = mine(*parts)
        weighed(output).backward()
        back = [gather(_like(p.grad, p), mesh) for p in parts if p.grad is not None and p.dim() > 2]
        buffers = dict(mine.named_buffers())
        return [t.detach() for t in tensors(gather(output, mesh))], gradients(mine), back, buffers

    with captured_once():
        results = run_ranks(work, spatial, axes)
    return _compared(whole, expected, leaves, results)


def _like(gradient: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    found = part_of(part)
    return gradient if found is None else mark(gradient, found)


def _compared(whole: nn.Module, expected: Any, leaves: Sequence[torch.Tensor], results: list[Any]) -> dict[str, float]:
    want = gradients(whole)
    scale = max((float(g.nan_to_num().abs().max()) for g in want.values()), default=1.0)
    found = {"output": 0.0, "parameters": 0.0, "inputs": 0.0, "buffers": 0.0}
    for outputs, _, back, buffers in results:
        pairs = list(zip(tensors(expected), outputs, strict=True))
        found["output"] = max([found["output"], *(distance(a.detach(), b) for a, b in pairs)])
        spread = [x.grad for x in leaves if x.grad is not None and x.dim() > 2]
        found["inputs"] = max([found["inputs"], *(distance(a, b) for a, b in zip(spread, back, strict=True))])
        same = [distance(t, buffers[n]) for n, t in whole.named_buffers()]
        found["buffers"] = max([found["buffers"], *same])
    assert all(set(r[1]) == set(want) for r in results)  # none where the whole has none
    for name, gradient in want.items():
        total = sum(r[1][name] for r in results)
        found["parameters"] = max(found["parameters"], distance(gradient, total, scale))
    return found


def worst(*args: Any, **kwargs: Any) -> float:
    """The largest of the errors."""
    return max(errors_of(*args, **kwargs).values())

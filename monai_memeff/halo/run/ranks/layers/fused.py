"""Norms of a plan by torch's own kernels: the same numbers as the rules' partial results, with less memory and time.

The rules take a norm apart into moments and a step row for row. Here the moments are plain numbers, and the step's
backward holds what they contribute to the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from monai_memeff.halo.planning.program import Program, Value
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.layers.norm import Form, normalize, whole_moments
from monai_memeff.halo.run.ranks.placement import Placement


def form_of(program: Program, source: Placement, moments: int) -> Form | None:
    """The form of a norm's moments, None if the kernels do not fit.

    Args:
        program: the captured network.
        source: how the normalized tensor is spread; along every axis of the mesh, and along spatial dimensions.
        moments: index of the moments.
    """
    value = program.values[moments]
    source_ref, dims, groups = value.args[:3]
    x = program.values[source_ref.index]
    places = [p for p in source.layout.places if p is not None]
    if None in source.cuts or any(d < 2 or not source.layout.plain(d) for d, _ in places) or len(x.shape) < 3:
        return None
    spatial = list(range(2, len(x.shape)))
    count = math.prod(x.shape[2:])
    if groups is not None:
        grouped = list(dims) == list(range(2, len(x.shape) + 1))
        return Form(False, groups, count * (x.shape[1] // groups)) if grouped else None
    if list(dims) == spatial:
        return Form(False, None, count)
    return Form(True, None, count * x.shape[0]) if list(dims) == [0, *spatial] else None


@dataclass
class FusedMoments:
    """Mean and variance of the whole on every rank, without a gradient."""

    mesh: HaloMesh
    value: Value
    form: Form

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.stack(whole_moments(self.mesh.comm, x.detach().reshape(self.form.flat(x))))
        return found.to(self.value.dtype).view(self.value.shape)


@dataclass
class FusedNormalize:
    """The normalized rows of this rank."""

    mesh: HaloMesh
    value: Value
    form: Form

    def __call__(self, x: torch.Tensor, moments: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
        has_weight, has_bias, eps, _ = self.value.args[-4:]
        rest = list(affine)
        weight = rest.pop(0) if has_weight else None
        bias = rest.pop(0) if has_bias else None
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, variance = moments.to(wide).flatten(1).unbind()
        return normalize(self.mesh.comm, x, (mean, variance), weight, bias, eps, self.form).to(self.value.dtype)

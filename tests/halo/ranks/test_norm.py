"""Normalization over ranks equals torch's on the whole: values, statistics and every gradient, empty parts too."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.layers import norm
from monai_memeff.memory import measure_peak
from tests.halo.ranks.threads import run_ranks

KINDS: dict[str, tuple[Callable[..., Any], norm.Form]] = {
    "instance": (lambda x, w, b: F.instance_norm(x, None, None, w, b), norm.Form(False, None, 105)),
    "batch": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), norm.Form(True, None, 210)),
    "group": (lambda x, w, b: F.group_norm(x, 2, w, b), norm.Form(False, 2, 210)),
}


@pytest.mark.parametrize(("kind", "affine"), list(itertools.product(KINDS, ["both", "weight", "none"])))
@pytest.mark.parametrize("bounds", [(0, 2, 7), (0, 0, 5, 7, 7)], ids=["uneven", "with empty parts"])
def test_equal_to_the_whole(kind: str, affine: str, bounds: tuple[int, ...]) -> None:
    whole, form = KINDS[kind]
    x = (torch.randn(2, 4, 7, 3, 5).double() * 3 + 1000).requires_grad_()
    weight = torch.randn(4).double().requires_grad_() if affine != "none" else None
    bias = torch.randn(4).double().requires_grad_() if affine == "both" else None
    other = torch.randn_like(x)
    y = whole(x, weight, bias)
    expected = torch.autograd.grad((y * other).sum(), [t for t in (x, weight, bias) if t is not None])

    def work(mesh: HaloMesh) -> tuple[torch.Tensor, Any]:
        rows = slice(*bounds[mesh.comm.rank : mesh.comm.rank + 2])
        mine = [None if t is None else t.detach().clone().requires_grad_() for t in (weight, bias)]
        part = x.detach()[:, :, rows].clone().requires_grad_()
        moments = norm.whole_moments(mesh.comm, part.detach().reshape(form.flat(part)))
        out = norm.normalize(mesh.comm, part, moments, *mine, 1e-5, form)
        return out.detach(), torch.autograd.grad(
            (out * other[:, :, rows]).sum(), [t for t in (part, *mine) if t is not None]
        )

    results = run_ranks(work, (len(bounds) - 1,))
    torch.testing.assert_close(torch.cat([r[0] for r in results], 2), y.detach(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(torch.cat([r[1][0] for r in results], 2), expected[0], atol=1e-9, rtol=1e-9)
    for i in range(1, len(expected)):
        torch.testing.assert_close(sum(r[1][i] for r in results), expected[i], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.slow
def test_statistics_of_half_precision_need_no_float_copy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(2, 16, 1000) * 200 + 300).to(dtype)
    at_once = norm._moments(x)
    monkeypatch.setattr(norm, "WIDENED", 4000)
    with measure_peak() as meter:
        found = norm._moments(x)
    assert meter.peak_bytes < x.nbytes / 2
    torch.testing.assert_close(found, at_once)
    assert found[1].dtype == torch.float32

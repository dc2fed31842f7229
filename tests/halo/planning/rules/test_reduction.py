"""Reductions in every spelling, views, slices and products, cut anywhere, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.halo.parts import in_parts
from tests.halo.planning.rules.test_windowed import Call

REDUCTIONS = {
    "std(True)": lambda x: x.std(True),
    "var(0)": lambda x: x.var((2, 3), correction=0),
    "var_mean": lambda x: torch.var_mean(x, (2, 3, 4), keepdim=True),
    "mean()": lambda x: x.mean(dim=()),
    "mean keep": lambda x: x.mean((2, 3, 4), keepdim=True) + x,
    "sum bool": lambda x: (x > 0).sum(2),
    "amax()": lambda x: torch.amax(x, ()),
    "amin": lambda x: x.amin((0, 2)),
    "max": lambda x: x.max(),
    "max dim": lambda x: x.max(2),
    "min other": lambda x: x.min(3, keepdim=True),
    "argmax": lambda x: x.argmax(2),
    "argmax flat": lambda x: x.argmax(),
    "prod": lambda x: x.prod(2),
    "logsumexp": lambda x: torch.logsumexp(x, (1, 2)),
    "norm": lambda x: (torch.norm(x), x.norm(1, 2), torch.linalg.vector_norm(x, 3, (2, 4))),
    "inf norm": lambda x: torch.linalg.vector_norm(x, float("inf")),
    "any": lambda x: ((x > 2).any(), (x > 2).all(2), (x > -9).all()),
    "cumsum": lambda x: x.cumsum(2),
    "softmax over rows": lambda x: x.softmax(2) + x.log_softmax(1),
    "median": lambda x: x.median(),
    "count": lambda x: torch.count_nonzero(x > 0),
}
SHAPES = {
    "windows": lambda x: (
        x[:, :, :8].reshape(2, 3, 2, 4, -1, 2, 5).permute(0, 2, 4, 3, 5, 6, 1).reshape(-1, 8, 5, 3).relu()
    ),
    "flat": lambda x: x.flatten(2).transpose(1, 2) @ torch.ones(3, 4, dtype=x.dtype),
    "there and back": lambda x: (x.flatten(2) * 2).view(x.shape),
    "unflatten": lambda x: x[:, :, :9].unflatten(2, (3, 3)).sum(3),
    "slices": lambda x: x[:, :, 1:10:3] + x[:, :, -3:].flip(2),
    "select": lambda x: x[:, :, 4] - x[:, :, -1],
    "roll": lambda x: torch.roll(x, (3, -2), (2, 3)),
    "flip": lambda x: x.flip(2, 4),
    "cat rows": lambda x: torch.cat([x, x[:, :, 2:5], x.flip(2)], 2),
    "cat channels": lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1),
    "stack": lambda x: torch.stack([x, x * 2], 2).sum(3),
    "split": lambda x: torch.split(x, 4, 2)[1] * x.chunk(3, 1)[0][:, :, :4],
    "unbind": lambda x: x.unbind(2)[3] + x.unbind(1)[0][:, 0].unsqueeze(1),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "assign": lambda x: x.clone().index_fill_(2, torch.tensor([1, 2]), 0.0),
    "in place": lambda x: torch.relu_((x * 1)[:, :2]),
    "coordinates": lambda x: x * torch.linspace(-1, 1, x.shape[2], dtype=x.dtype).view(1, 1, -1, 1, 1) / x.size(2),
    "meshgrid": lambda x: torch.stack(torch.meshgrid(*[torch.arange(n) for n in x.shape[2:]], indexing="ij")) + x[:1],
    "repeat": lambda x: x.repeat(1, 2, 2, 1, 1) + x.repeat_interleave(2, 2).repeat(1, 2, 1, 1, 1),
    "einsum": lambda x: torch.einsum("bcdhw,bkdhw->bkdh", x, x),
    "contraction": lambda x: torch.einsum("bcdhw,bkdhw->bck", x, x),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.flatten(3).transpose(1, 2)] * 3),
    "grid": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(3, 4, dtype=x.dtype)[None].repeat(2, 1, 1), (2, 3, 9, 7, 6))
    ),
    "pooled and spread": lambda x: F.conv3d(
        F.adaptive_avg_pool3d(x, 1).expand_as(x), torch.ones(1, 3, 3, 3, 3).double()
    ),
    "layer norm": lambda x: F.layer_norm(x, x.shape[2:]) + F.layer_norm(x.movedim(1, -1), (3,)).movedim(-1, 1),
    "prelu of a size": lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype)),
    "glu": lambda x: F.glu(x, 4),
    "sort": lambda x: x.sort(2).values + x.topk(4, 4).values.sum(4, keepdim=True),
    "fft": lambda x: torch.fft.rfftn(x, dim=(2, 3, 4)).abs(),
    "local response": lambda x: F.local_response_norm(x, 2),
}


@pytest.mark.parametrize("name", [*REDUCTIONS, *SHAPES])
@pytest.mark.slow
def test_function(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 6, 10, dtype=torch.float64)
    function = {**REDUCTIONS, **SHAPES}[name]
    for axis in (0, 2):
        assert in_parts(Call(function), x, axes=(axis,), cuts=[(0.2, 0.34, 0.8)], tiled=False) < 1e-10

"""Operators that nobody listed, and code that depends on the data: exact, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from tests.halo.kinds import small_conv
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import plain, try_settings

SETTINGS = [(0, 3), (1, 2), (0, 100)]


def x_of() -> torch.Tensor:
    return torch.randn(1, 2, 13, 7, 6, dtype=torch.float64)


UNLISTED: dict[str, Callable[[torch.Tensor], Any]] = {
    "fft": lambda x: torch.fft.fftn(x, dim=(2, 3, 4)).real * 0.01,
    "complex": lambda x: torch.fft.rfft(x, dim=2) * 1j,
    "complex product": lambda x: torch.view_as_real(torch.complex(x, -x) ** 2)[..., 1],
    "cumsum": lambda x: x.cumsum(2),
    "cumprod": lambda x: x.cumprod(3),
    "cummax": lambda x: x.cummax(2)[0],
    "softmax": lambda x: x.softmax(2),
    "log_softmax": lambda x: x.log_softmax(4),
    "sort": lambda x: x.sort(2)[0],
    "argsort": lambda x: x.argsort(2),
    "topk": lambda x: x.topk(3, 2)[0],
    "kthvalue": lambda x: x.kthvalue(2, 2, True)[0],
    "renorm": lambda x: x.renorm(2, 1, 1.0),
    "normalize": lambda x: F.normalize(x, dim=2),
    "diff": lambda x: x.diff(dim=3, prepend=x[:, :, :, :1]),
    "grid_sample": lambda x: F.grid_sample(
        x,
        F.affine_grid(torch.eye(3, 4, dtype=x.dtype)[None] * 0.9, list(x.shape), align_corners=False),
        align_corners=False,
    ),
    "warped": lambda x: F.grid_sample(x, x.movedim(1, -1)[..., [0, 1, 0]].tanh(), align_corners=True),
    "einsum": lambda x: torch.einsum("bcdhw,bedhw->bcehw", x, x),
    "einsum ellipsis": lambda x: torch.einsum("bc...,ec->be...", x, torch.eye(2, dtype=x.dtype)),
    "bool": lambda x: x > 0,
    "integers": lambda x: (x * 10).long(),
    "bytes": lambda x: (x.abs() * 10).to(torch.uint8) // 3,
    "several types": lambda x: (x > 0, x.float(), x.half(), x.long().sum()),
    "a view of the input": lambda x: x[:, :, 2:-1].transpose(3, 4),
    "the input": lambda x: x,
    "constants": lambda x: (torch.ones(3), 5, "text", None, x + 1),
    "the same twice": lambda x: [x + 1] * 2,
    "outer product": lambda x: x.mean((3, 4), keepdim=True) * x.mean((2, 3), keepdim=True),
    "cdist": lambda x: torch.cdist(x[:, 0, :, 0], x[:, 1, :, 0]),
    "histogram": lambda x: torch.histc(x, 8),
    "one hot": lambda x: F.one_hot((x[:, 0] > 0).long(), 2).movedim(-1, 1),
    "scatter": lambda x: torch.zeros_like(x).scatter(2, (x.abs() * 3).long().clamp(0, 12), x),
    "index_add": lambda x: x.index_add(2, torch.tensor([0, 0, 12]), x[:, :, :3]),
    "masked": lambda x: x.masked_fill(x > 0, 0),
    "where": lambda x: torch.where(x > x.mean(), x, x.amin()),
    "tril": lambda x: x.tril(),
    "trace": lambda x: x[0, 0, :6, :6, 0].trace(),
    "kron": lambda x: torch.kron(x[0, 0, :, :, 0], torch.ones(2, 2, dtype=x.dtype)),
    "bmm": lambda x: torch.bmm(x[:, 0].flatten(2), x[:, 0].flatten(2).transpose(1, 2)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)] * 3),
    "causal attention": lambda x: F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)] * 3, is_causal=True),
    "attention of one token": lambda x: F.scaled_dot_product_attention(*[x.mean((2, 3, 4))[:, None]] * 3),
    "unfold": lambda x: x.unfold(2, 3, 2).unfold(3, 2, 1).sum((-1, -2)),
    "fold": lambda x: F.fold(F.unfold(x[:, :, :, :, 0], 3, padding=1), (13, 7), 3, padding=1),
    "pixel shuffle": lambda x: F.pixel_unshuffle(x[:, :, :12, :6, 0], 2),
    "roll twice": lambda x: x.roll((1, -1, 3), (2, 2, 3)),
    "flip": lambda x: x.flip(0, 2),
    "cosine": lambda x: F.cosine_similarity(x, x.roll(1, 2), 2),
    "max indices": lambda x: F.max_unpool3d(*F.max_pool3d(x[:, :, :12, :6], 2, return_indices=True), 2),
    "nan": lambda x: torch.nan_to_num((x - 100).log(), 3),
    "a number": lambda x: x.sum(),
    "no dimension left": lambda x: x.mean((2, 3, 4)),
    "searchsorted": lambda x: torch.searchsorted(x.flatten().sort()[0], x),
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([0.0, 1], dtype=x.dtype)),
    "quantile": lambda x: x.quantile(0.3, 2, keepdim=True),
    "mode": lambda x: (x * 2).round().mode(2, keepdim=True)[0],
    "median": lambda x: x - x.median(2, True)[0],
    "vander": lambda x: torch.vander(x[0, 0, :, 0, 0], 3),
    "linalg": lambda x: torch.linalg.inv(x[0, 0, :6, :6, 0] + 9 * torch.eye(6, dtype=x.dtype)),
    "clamp by tensors": lambda x: x.clamp(x.amin(2, True) * 0.5, x.amax(2, True) * 0.5),
    "embedding": lambda x: F.embedding((x[:, 0] > 0).long(), torch.eye(2, dtype=x.dtype)),
    "cross": lambda x: torch.cross(x.expand(3, 2, *x.shape[2:]), x.flip(2).expand(3, 2, *x.shape[2:]), 0),
    "logcumsumexp": lambda x: x.logcumsumexp(2),
    "trapezoid": lambda x: torch.trapezoid(x, dim=2),
    "lerp": lambda x: torch.lerp(x, x.flip(2), 0.3),
    "glu": lambda x: F.glu(x[:, :, :12], 2),
    "tensor_split": lambda x: torch.cat(x.tensor_split((3, 5), 2)[::-1], 2),
    "antialias": lambda x: F.interpolate(x[..., 0], (5, 4), mode="bilinear", antialias=True),
    "allclose": lambda x: x if torch.is_tensor(x) else None,
    "strided view": lambda x: x.as_strided((1, 2, 6, 7, 6), x.stride()),
    "put": lambda x: x.index_put(
        (torch.tensor([0]), torch.tensor([1]), torch.tensor([4])), torch.tensor(9.0, dtype=x.dtype)
    ),
}

READ_BEFORE_214 = ("quantile",)
"""Operators that read a value in releases before torch 2.14 (seen in 2.11), so that `torch.export` refuses them."""

DEPEND_ON_DATA: dict[str, Callable[[torch.Tensor], Any]] = {
    "nonzero": lambda x: x.nonzero(),
    "repeats of each": lambda x: x.repeat_interleave(torch.tensor([1, 3]), 1),
    "boolean index": lambda x: x[x > 0],
    "item": lambda x: x * x.mean().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "unique": lambda x: x.round().unique(),
    "bincount": lambda x: torch.bincount((x.abs() * 3).long().flatten()),
    "random Python": lambda x: x * __import__("random").random(),
    "numpy": lambda x: torch.from_numpy(x.numpy() * 2),
}


@pytest.mark.long
@pytest.mark.parametrize("name", UNLISTED)
def test_operators_that_nobody_listed(name: str) -> None:
    x = x_of()
    network = Call(name, lambda x: UNLISTED[name](x)).double()
    tried = try_settings(network, (x,), SETTINGS)
    if name in READ_BEFORE_214 and torch.__version__ < (2, 14):
        assert (tried.exact, len(tried.refused)) == (0, 3), tried.refused
        return
    assert tried.exact == 3, tried.refused
    result = plain(network, (x.clone(),))
    if isinstance(result, torch.Tensor) and result.dtype == x.dtype and result.dim() == 5:  # rows meet afterwards
        meets = nn.Sequential(small_conv(3), network, nn.Conv3d(result.shape[1], 2, 3, padding=1)).double()
        assert try_settings(meets, (x,), SETTINGS).exact == 3


@pytest.mark.parametrize("name", DEPEND_ON_DATA)
@pytest.mark.slow
def test_what_depends_on_the_data_is_refused(name: str) -> None:
    with pytest.raises(NotPartitionableError) as refusal:
        SpatialPartitionInferer(3)(x_of(), nn.Sequential(small_conv(3), Call(name, DEPEND_ON_DATA[name])).double())
    assert len(str(refusal.value)) > 20

"""Code that no layer is made of: memory that overlaps, sums along the cut, Fourier transforms, complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from monai_memeff.halo.planning.state.overlap import _partly
from tests.halo.kinds import small_conv
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import difference, plain, try_settings

Fn = Callable[[torch.Tensor], Any]


def volume(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, 2, 11, 6, 5, dtype=torch.float64).to(dtype)


def sphere(x: torch.Tensor) -> torch.Tensor:
    axes = [torch.arange(n, dtype=x.dtype) - 3 for n in x.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0) < 9


def edited(*edits: Fn) -> Fn:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        for edit in edits:
            edit(y)
        return y

    return run


def thirds(x: torch.Tensor) -> torch.Tensor:
    return (torch.arange(x.shape[2]) // 3).view(1, 1, -1, 1, 1).expand_as(x)


CODE: dict[str, Fn] = {
    "einsum": lambda x: torch.einsum("bcdhw,behwd->bce", x, x.movedim(2, -1)).mean() + x,
    "scatter": lambda x: torch.zeros_like(x).scatter(2, x.argsort(2), x),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(2, thirds(x), x),
    "scatter_reduce": lambda x: torch.zeros_like(x).scatter_reduce(2, thirds(x), x, "amax"),
    "index_add": lambda x: torch.zeros_like(x).index_add(2, torch.arange(11) // 2, x),
    "index_copy": lambda x: x.index_copy(2, torch.tensor([3, 1]), x[:, :, [0, 5]]),
    "index_fill": lambda x: x.index_fill(2, torch.tensor([3, 1]), 7.0),
    "take": lambda x: x + x.take(torch.tensor([5, 100])).sum(),
    "a mask of coordinates": lambda x: torch.where(sphere(x), x, -x),
    "cumprod": lambda x: (x * 0.1 + 1).cumprod(2),
    "cummax": lambda x: x.cummax(2)[0] + x.cummax(2)[1],
    "logcumsumexp": lambda x: x.logcumsumexp(2),
    "topk": lambda x: x.topk(4, 2)[0],
    "kthvalue": lambda x: x - x.kthvalue(3, 2, keepdim=True)[0],
    "Fourier": lambda x: torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3, 4)) * 2, dim=(2, 3, 4)).real,
    "Fourier of reals": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=2), n=11, dim=2),
    "complex": lambda x: torch.view_as_real(torch.complex(x, x.flip(2)) * 1j).sum(-1),
    "mean of complex": lambda x: (torch.complex(x, x) - torch.complex(x, x).mean()).abs(),
    "rows swapped": edited(lambda y: y[:, :, 0].copy_(y[:, :, -1])),
    "views written": edited(lambda y: y.transpose(2, 4)[..., 3].add_(5), lambda y: y[:, 0].relu_()),
    "every other row": edited(lambda y: y[:, :, :10:2].add_(y[:, :, 1::2])),
    "kernel from data": lambda x: F.conv3d(x, x[:, :, :3, :3, :3], padding=1).expand(1, 2, 11, 6, 5),
    "grid_sample": lambda x: F.grid_sample(x, x.mean(1)[..., None].expand(1, 11, 6, 5, 3).tanh(), align_corners=True),
    "unpooled": lambda x: F.max_unpool3d(*F.max_pool3d(x[:, :, :10, :, :4], 2, return_indices=True), 2),
    "masked_scatter": lambda x: x.masked_scatter(x > 0, x.flip(2)),
    "vmap": lambda x: torch.vmap(lambda t: t - t.mean())(x),
    "renorm": lambda x: x.renorm(2, 2, 1.0),
    "nanmean": lambda x: x - x.log().nanmean(),
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.slow
def test_odd_code_equals_the_whole(name: str) -> None:
    network = nn.Sequential(small_conv(3), Call(name, CODE[name]), small_conv(3)).double().eval()
    tally = try_settings(network, (volume(),), [(0, 3)])
    assert tally.exact == 1, tally.refused


OVERLAPS: dict[str, Fn] = {
    "added to the next rows": edited(lambda y: y[:, :, 2:].add_(y[:, :, :-2])),
    "copied to the next rows": edited(
        lambda y: y.__setitem__((slice(None), slice(None), slice(1, None)), y[:, :, :-1])
    ),
    "transposed": edited(lambda y: y[:, :, :6].add_(y[:, :, :6].transpose(2, 3))),
    "one row to all": edited(lambda y: y.mul_(y[:, :, 3:4])),
    "out": edited(lambda y: torch.add(y[:, :, 1:], 1, out=y[:, :, :-1])),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_writing_over_what_is_read_is_refused(name: str) -> None:
    """Plain torch reads some of it after it was written; which, its kernels do not say."""
    with pytest.raises(NotPartitionableError, match=r"forward writes with .*clone\(\) what is read"):
        SpatialPartitionInferer(3)(volume(), Call(name, OVERLAPS[name]))


BOX = st.tuples(*[st.tuples(st.integers(0, n - 1), st.integers(1, n), st.sampled_from([1, 1, 2])) for n in (7, 6, 5)])


@settings(max_examples=300)
@given(BOX, BOX, st.booleans())
def test_overlaps_are_found_element_by_element(a: Any, b: Any, alike: bool) -> None:
    base = torch.arange(7 * 6 * 5).view(7, 6, 5)
    first = base[tuple(slice(lo, lo + n, step) for lo, n, step in a)]
    steps = [step for _, _, step in (a if alike else b)]
    second = base[tuple(slice(lo, lo + n, step) for (lo, n, _), step in zip(b, steps, strict=True))]
    shared = bool(set(first.flatten().tolist()) & set(second.flatten().tolist()))
    itself = first.shape == second.shape and first.stride() == second.stride() and torch.equal(first, second)
    if first.stride() == second.stride():
        assert _partly(first, second) == (shared and not itself)
    elif shared:
        assert _partly(first, second)


ARGUMENTS: dict[str, Callable[[], torch.Tensor]] = {
    "channels last": lambda: volume().contiguous(memory_format=torch.channels_last_3d),
    "not contiguous": lambda: volume().transpose(2, 4).flip(2)[..., ::2],
    "expanded": lambda: volume()[:, :, :1].expand(1, 2, 9, 6, 5),
    "wants a gradient": lambda: volume().requires_grad_(),
    "no batch": lambda: volume()[:0],
    "one row": lambda: volume()[:, :, :1],
    "one column": lambda: volume()[..., :1, :1],
    "bfloat16": lambda: volume(torch.bfloat16),
    "float16": lambda: volume(torch.float16),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.slow
def test_odd_arguments(name: str) -> None:
    x = ARGUMENTS[name]()
    network = nn.Sequential(small_conv(3), nn.LeakyReLU(), small_conv(3)).to(x.dtype).eval()
    assert difference(SpatialPartitionInferer(3)(x, network), plain(network, (x,))) < (
        2e-2 if x.element_size() < 4 else 1e-12
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.slow
def test_a_tracked_norm_that_is_used_twice(train: bool) -> None:
    norm = nn.InstanceNorm3d(2, affine=True, track_running_stats=True)
    network = nn.Sequential(small_conv(3), norm, small_conv(3), norm).double().train(train)
    kept = {k: v.clone() for k, v in network.state_dict().items()}
    assert try_settings(network, (volume(),), [(0, 3)]).exact == 1
    assert all(torch.equal(v, kept[k]) for k, v in network.state_dict().items())


READ: dict[str, Callable[[], bool]] = {
    "is_compiling": torch.compiler.is_compiling,
    "is_exporting": torch.compiler.is_exporting,
    "torch._utils": torch._utils.is_compiling,
}


@pytest.mark.parametrize("name", READ)
def test_code_that_reads_whether_it_is_compiled_is_answered_as_in_a_plain_call(name: str) -> None:
    code = READ[name].__code__
    network, x = Call(name, lambda x: x * (2 if READ[name]() else 3)), volume()
    assert torch.equal(SpatialPartitionInferer(2)(x, network), x * 3)
    assert READ[name].__code__ is code

"""Pooling, padding, resizing and transposed convolutions in random combinations, cut at random rows, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.halo.parts import in_parts

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FAST = settings(max_examples=12, deadline=None, derandomize=True)


class Call(nn.Module):
    """A function of one tensor as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        """The function's result."""
        return self.function(x)


def volume(draw, dims: int, low: int = 6, high: int = 11) -> torch.Tensor:
    """A random volume of random size."""
    size = [draw(st.integers(low, high)) for _ in range(dims)]
    return torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size)))


def several(draw, dims: int, low: int, high: int) -> tuple[int, ...]:
    """A number for each dimension."""
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


def cuts(draw, dims: int) -> dict:
    """A random axis and random places to cut it."""
    return {"axes": (draw(st.integers(0, dims - 1)),), "cuts": [draw(st.lists(st.floats(0, 1), max_size=4))]}


@FAST
@given(st.data())
@pytest.mark.slow
def test_transposed_convolutions(data):
    draw = data.draw
    dims = draw(st.integers(1, 3))
    kernel, stride, dilation = several(draw, dims, 1, 4), several(draw, dims, 1, 4), several(draw, dims, 1, 3)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    padding = several(draw, dims, 0, 3)
    x = volume(draw, dims, 4, 8)
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(x.shape[2:], stride, padding, dilation, kernel, extra, strict=True)
    ]
    assume(all(n > 0 for n in sizes))
    groups = draw(st.sampled_from([1, 2]))
    layer = TRANSPOSED[dims](2, 4, kernel, stride, padding, extra, groups, draw(st.booleans()), dilation).double()
    assert in_parts(layer, x, **cuts(draw, dims)) < 1e-12


@FAST
@given(st.data())
@pytest.mark.slow
def test_max_pooling_with_places(data):
    draw = data.draw
    dims = draw(st.integers(1, 3))
    kernel, stride = several(draw, dims, 1, 4), several(draw, dims, 1, 4)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    kind = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    options = {
        "ceil_mode": draw(st.booleans()),
        "dilation": draw(st.integers(1, 2)),
        "return_indices": draw(st.booleans()),
    }
    x = volume(draw, dims, 8, 11)
    assert in_parts(Call(lambda x: kind(x, kernel, stride, padding, **options)), x, **cuts(draw, dims)) == 0


@FAST
@given(st.data())
@pytest.mark.slow
def test_average_pooling_counts_as_torch_does(data):
    draw = data.draw
    dims = draw(st.integers(1, 3))
    kernel, stride = several(draw, dims, 1, 4), several(draw, dims, 1, 4)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    options = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
    if dims > 1:
        options["divisor_override"] = draw(st.sampled_from([None, 5]))
    kind = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    x = volume(draw, dims)
    assert in_parts(Call(lambda x: kind(x, kernel, stride, padding, **options)), x, **cuts(draw, dims)) < 1e-12


@FAST
@given(st.data())
@pytest.mark.slow
def test_adaptive_pooling(data):
    draw = data.draw
    dims = draw(st.integers(1, 3))
    size = tuple(draw(st.sampled_from([None, 1, 2, 5, 12])) for _ in range(dims))
    size = size[0] or 3 if dims == 1 else size
    average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    largest = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
    kind = draw(st.sampled_from([average, largest]))[dims - 1]
    assert in_parts(Call(lambda x: kind(x, size)), volume(draw, dims), **cuts(draw, dims)) < 1e-12


@FAST
@given(st.data())
@pytest.mark.slow
def test_padding_of_every_mode_and_sign(data):
    draw = data.draw
    dims = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    most = {"constant": 9, "replicate": 9, "reflect": 5, "circular": 6}[mode]
    pads = [draw(st.integers(-2, most)) for _ in range(2 * dims)]
    value = draw(st.sampled_from([0.0, 2.5])) if mode == "constant" else None
    if mode in ("reflect", "circular"):
        assume(all(n >= 0 for n in pads) or mode == "constant")
    assert in_parts(Call(lambda x: F.pad(x, pads, mode, value)), volume(draw, dims), **cuts(draw, dims)) == 0


@settings(max_examples=24, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.slow
def test_resizing_of_every_mode(data):
    draw = data.draw
    dims = draw(st.integers(1, 3))
    smooth = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}[dims]
    mode = draw(st.sampled_from(["nearest", "nearest-exact", *smooth]))
    options = {"mode": mode}
    if mode in smooth:
        options["align_corners"] = draw(st.booleans())
    if draw(st.booleans()):
        options["size"] = several(draw, dims, 1, 23)
    else:
        options["scale_factor"] = tuple(draw(st.sampled_from([0.5, 1.0, 1.3, 2.0, 2.7, 3.0])) for _ in range(dims))
        options["recompute_scale_factor"] = draw(st.sampled_from([None, True]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    x = volume(draw, dims).to(dtype)
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert in_parts(Call(lambda x: F.interpolate(x, **options)), x, **cuts(draw, dims)) < limit


@pytest.mark.slow
def test_nearest_by_a_factor_over_many_rows():
    x = torch.randn(1, 1, 128, 5, 5)
    net = Call(lambda x: F.interpolate(x, scale_factor=1.3))
    assert in_parts(net, x, cuts=[(0.1, 0.37, 0.7)]) == 0

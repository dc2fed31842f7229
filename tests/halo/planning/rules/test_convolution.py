"""Convolutions in random combinations, cut at random rows, against torch."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.halo.parts import in_parts

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw):
    """A convolution of any legal kind, an input for it, an axis and cuts."""
    dims = draw(st.integers(1, 3))
    each = lambda lo, hi: tuple(draw(st.integers(lo, hi)) for _ in range(dims))  # noqa: E731
    kernel, dilation, size = each(1, 5), each(1, 3), each(7, 12)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    stride = (1,) * dims if same else each(1, 4)
    padding = draw(st.sampled_from(["same", "valid"])) if same else each(0, 7 if mode == "zeros" else 3)
    pads = [0] * dims if isinstance(padding, str) else padding
    groups = draw(st.sampled_from([1, 2]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    assume(all(r < n + 2 * p for r, n, p in zip(reach, size, pads, strict=True)))
    assume(padding != "same" or mode == "zeros" or all(r // 2 + 1 < n for r, n in zip(reach, size, strict=True)))
    bias = draw(st.booleans())
    layer = KINDS[dims](2, 4, kernel, stride, padding, dilation, groups, bias, mode)
    axis = draw(st.integers(0, dims - 1))
    cuts = draw(st.lists(st.floats(0, 1), max_size=4))
    return layer.double(), torch.randn(2, 2, *size, dtype=torch.float64), axis, cuts


@settings(max_examples=20, deadline=None, derandomize=True)
@given(convolutions())
@pytest.mark.slow
def test_any_convolution_at_any_cut(case):
    layer, x, axis, cuts = case
    assert in_parts(layer, x, axes=(axis,), cuts=[cuts], tiled=layer.padding_mode == "zeros") < 1e-12


def test_two_axes_at_once():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv3d(1, 2, (1, 3, 3), padding=1), nn.Conv3d(2, 3, 3, stride=2, padding=4)).double()
    assert in_parts(layer, torch.randn(1, 1, 18, 9, 11).double(), axes=(0, 2), cuts=[(0.2, 0.5), (0.4,)]) < 1e-12

"""Parts cover an axis once, and the inputs of an output are those that torch's own layers read."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from monai_memeff.geometry.partition import Stencil, split_axis


def layer(stencil: Stencil) -> nn.Module:
    """The torch layer that a stencil describes, with positive weights so that nothing cancels."""
    kind = nn.ConvTranspose1d if stencil.transposed else nn.Conv1d
    options = {"output_padding": stencil.output_padding} if stencil.transposed else {}
    built = kind(
        1, 1, stencil.kernel, stencil.stride, stencil.padding, dilation=stencil.dilation, bias=False, **options
    ).double()
    nn.init.uniform_(built.weight, 0.5, 1.5)
    return built


def support(net: nn.Module, size: int, start: int, stop: int) -> list[int]:
    """The inputs that have a gradient from outputs start..stop."""
    x = torch.rand(1, 1, size, dtype=torch.float64, requires_grad=True)
    net(x)[..., start:stop].sum().backward()
    return x.grad[0, 0].nonzero()[:, 0].tolist()


# Cuts


@pytest.mark.parametrize("size", [1, 7, 16, 40, 41, 47])
@pytest.mark.parametrize("alignment", [1, 4, 8])
def test_cuts_are_aligned_and_even(size: int, alignment: int) -> None:
    for parts in range(1, max(1, size // alignment) + 1):
        pieces = split_axis(size, parts, alignment)
        assert [start for start, _ in pieces[1:]] == [stop for _, stop in pieces[:-1]]
        assert (pieces[0][0], pieces[-1][1]) == (0, size)
        assert all(start % alignment == 0 for start, _ in pieces)
        lengths = [stop - start for start, stop in pieces]
        assert min(lengths) >= min(size, alignment)
        lengths[-1] -= size % alignment if size > alignment else 0
        assert max(lengths) - min(lengths) <= alignment


def test_the_last_part_takes_the_rest() -> None:
    assert split_axis(40, 3, 4) == [(0, 12), (12, 24), (24, 40)]
    assert split_axis(21, 2, 8) == [(0, 8), (8, 21)]
    assert split_axis(5, 1, 8) == [(0, 5)]


def test_weighted_cuts() -> None:
    assert split_axis(48, 2, 8, weights=[1, 2]) == [(0, 16), (16, 48)]
    assert split_axis(48, 3, 8, weights=[100, 1, 1]) == [(0, 32), (32, 40), (40, 48)]
    assert split_axis(48, 3, 8, weights=[1, 1, 100]) == [(0, 8), (8, 16), (16, 48)]


def test_impossible_cuts_are_refused() -> None:
    with pytest.raises(ValueError, match="40 voxels cut at multiples of 16 has at most 2 parts, got 3"):
        split_axis(40, 3, 16)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        split_axis(0, 1)
    with pytest.raises(ValueError, match="2 positive numbers"):
        split_axis(8, 2, weights=[1, 0])


# Inputs of an output

STENCILS = [
    Stencil(kernel, stride, dilation, padding, output_padding, transposed)
    for transposed, kernel, stride, dilation, padding in product([False, True], [1, 2, 3, 5], [1, 2, 3], [1, 2], [0, 1])
    for output_padding in ([0, stride - 1] if transposed and stride > 1 else [0])
]


@pytest.mark.parametrize("stencil", STENCILS, ids=str)
def test_one_layer_has_torchs_size_and_support(stencil: Stencil) -> None:
    size, net = 31, layer(stencil)
    out = stencil.output_size(size)
    assert out == net(torch.zeros(1, 1, size, dtype=torch.float64)).shape[-1]
    for start, stop in [(0, 1), (0, out), (out - 1, out), (out // 2, out // 2 + 1), (out // 3, out // 2)]:
        first, last = stencil.inputs_of(start, stop)
        seen = support(net, size, start, stop)
        assert all(first <= index < last for index in seen)
        if first >= 0 and last <= size:  # where the border cuts nothing off, the interval is tight
            assert seen == [] if first == last else (first, last) == (seen[0], seen[-1] + 1)


def test_impossible_stencils_are_refused() -> None:
    with pytest.raises(ValueError, match="start at 1"):
        Stencil(3, stride=0)
    with pytest.raises(ValueError, match="belongs to transposed"):
        Stencil(3, output_padding=1)


def test_empty_intervals_need_nothing() -> None:
    assert Stencil(3, 1, 1, 1).inputs_of(4, 4) == (0, 0)

"""Boxes cover a volume once, and receptive fields are those that torch's own layers have."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from monai_memeff.geometry.partition import (
    Box,
    Stencil,
    margins,
    output_size,
    receptive_field,
    split_axis,
    split_volume,
    total_stride,
)

DOWN, UP = Stencil(3, 2, 1, 1), Stencil(3, 2, 1, 1, 1, transposed=True)
SAME = Stencil(3, 1, 1, 1)

CHAINS = {
    "one 3-conv": [SAME],
    "dilated": [Stencil(3, 1, 3, 3), Stencil(5, 1, 2, 4)],
    "even kernels": [Stencil(4, 2, 1, 1), Stencil(2, 2), Stencil(2, 2, transposed=True), Stencil(4, 2, 1, 1, 0, True)],
    "monai unet, 3 levels": [DOWN, DOWN, SAME, UP, UP],
    "pooling unet": [SAME, SAME, Stencil(2, 2), SAME, SAME, Stencil(2, 2, transposed=True), SAME, SAME],
    "encoder": [Stencil(7, 2, 1, 3), Stencil(3, 2, 1, 1), SAME],
    "gaps": [Stencil(1, 3), SAME, Stencil(2, 3, transposed=True)],
    "decoder": [Stencil(3, 2, 1, 1, 1, True), SAME],
    "no padding": [Stencil(3), Stencil(3)],
}


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


# Boxes


def test_box_arithmetic() -> None:
    box = Box((2, 0, -3), (5, 4, 6))
    assert box.shape == (3, 4, 9)
    assert box.voxels == 108
    assert box.grow(1).grow((0, 2, 0), 0) == Box((1, -3, -4), (6, 5, 7))
    assert box.grow(-1, 0) == Box((3, 1, -2), (5, 4, 6))
    assert box.clip((4, 4, 4)) == Box((2, 0, 0), (4, 4, 4))
    assert box.shift((1, 0, 3)) == Box((3, 0, 0), (6, 4, 9))
    assert Box((3, 1, 0), (4, 2, 1)).within(box) == Box((1, 1, 3), (2, 2, 4))
    assert box.contains(box.grow(-1))
    assert not box.contains(box.grow(0, 1))


def test_boxes_that_do_not_touch_meet_in_nothing() -> None:
    met = Box((0, 0), (3, 9)).intersect(Box((5, 2), (8, 4)))
    assert met.is_empty
    assert met.voxels == 0
    assert Box((0, 0), (3, 9)).contains(met)
    assert torch.zeros(9, 9)[met.slices].numel() == 0


def test_slices_cut_the_box_out_of_an_array() -> None:
    volume = torch.arange(4 * 5 * 6).view(1, 4, 5, 6)
    outer, inner = Box((1, 0, 2), (4, 5, 6)), Box((2, 1, 3), (3, 4, 6))
    cut = volume[(..., *outer.slices)][(..., *inner.within(outer).slices)]
    assert torch.equal(cut, volume[:, 2:3, 1:4, 3:6])


def test_slices_of_an_unclipped_box_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clipped .* got start \(-1, 0\)"):
        _ = Box((-1, 0), (2, 2)).slices


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="as many starts as stops"):
        Box((0, 0), (1,))
    with pytest.raises(ValueError, match="one per axis"):
        Box((0, 0), (1, 1)).grow((1, 2, 3))


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


def test_a_partition_covers_every_voxel_once() -> None:
    shape = (9, 16, 7)
    boxes = split_volume(shape, (2, 3, 1), (4, 4, 1))
    count = torch.zeros(shape)
    for box in boxes:
        count[box.slices] += 1
    assert len(boxes) == 6
    assert bool((count == 1).all())
    assert boxes[1] == Box((0, 4, 0), (4, 8, 7)), "the last axis runs fastest"


# Receptive fields

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


@pytest.mark.parametrize("stencil", STENCILS, ids=str)
def test_the_halo_of_one_layer(stencil: Stencil) -> None:
    """Against the support of an aligned piece in the middle of a long axis."""
    low, high = stencil.halo()
    step, net, start, stop = stencil.stride, layer(stencil), 12, 18
    if stencil.transposed:
        seen = support(net, 40, start * step, stop * step)
    else:
        seen, start, stop = support(net, 40 * step, start, stop), start * step, stop * step
    assert (start - low, stop + high) == (seen[0], seen[-1] + 1)


@pytest.mark.parametrize("name", CHAINS)
def test_the_receptive_field_of_a_chain(name: str) -> None:
    layers = CHAINS[name]
    net, size = nn.Sequential(*map(layer, layers)), 96
    out = net(torch.zeros(1, 1, size, dtype=torch.float64)).shape[-1]
    assert output_size(layers, size) == out
    for start, stop in [(out // 2, out // 2 + 1), (out // 3, out // 2), (0, 1), (out - 1, out)]:
        first, last = receptive_field(layers, start, stop)
        seen = support(net, size, start, stop)
        assert not seen or (max(0, first) <= seen[0] and seen[-1] < min(size, last))
        if seen and name != "gaps":
            assert (max(0, first), min(size, last)) == (seen[0], seen[-1] + 1)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("rest", [0, 5])
def test_a_box_with_its_margins_gives_the_whole_volumes_outputs(name: str, rest: int) -> None:
    layers = CHAINS[name]
    net, stride = nn.Sequential(*map(layer, layers)), total_stride(layers)
    low, high = margins(layers)
    low += -low % stride  # a cut keeps the phase of strided layers
    x = torch.rand(1, 1, 16 * stride + rest, dtype=torch.float64)
    whole = net(x)
    scale = output_size(layers, 32 * stride) - output_size(layers, 16 * stride), 16 * stride
    pieces = split_axis(x.shape[-1], 3, stride)
    for start, stop in pieces:
        box = Box((start,), (stop,)).grow(low, high).clip(x.shape[-1:])
        ours = net(x[(..., *box.slices)])
        first = start * scale[0] // scale[1]
        last = whole.shape[-1] if (start, stop) == pieces[-1] else min(whole.shape[-1], stop * scale[0] // scale[1])
        offset = box.start[0] * scale[0] // scale[1]
        assert_close(ours[..., first - offset : last - offset], whole[..., first:last])


def assert_close(ours: Tensor, whole: Tensor) -> None:
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)


def test_known_margins_and_strides() -> None:
    assert margins([SAME] * 4) == (4, 4)
    assert margins([Stencil(3), Stencil(3)]) == (0, 4)
    assert total_stride([DOWN, DOWN, SAME, UP, UP]) == 4
    assert total_stride([Stencil(3, 2, 1, 1), Stencil(3, 3, 1, 1)]) == 6
    assert total_stride([UP, DOWN]) == 1
    assert margins([]) == (0, 0)


def test_impossible_stencils_are_refused() -> None:
    with pytest.raises(ValueError, match="start at 1"):
        Stencil(3, stride=0)
    with pytest.raises(ValueError, match="belongs to transposed"):
        Stencil(3, output_padding=1)


def test_empty_intervals_need_nothing() -> None:
    assert SAME.inputs_of(4, 4) == (0, 0)
    assert receptive_field([SAME, DOWN], 2, 2) == (0, 0)

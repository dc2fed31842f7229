"""Kernel maps: both layouts and look-ups give the same convolution, against brute force, planned once per level."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import nn

from monai_memeff.geometry import key_lists
from monai_memeff.sparse import SparseConv3d, SparseConvTranspose3d, SparseTensor
from monai_memeff.sparse.core import generate, kernel_map, neighbors
from monai_memeff.sparse.core import offset_masks as masks
from monai_memeff.sparse.core.kernel_map import KernelMap, plan_kernel_map
from monai_memeff.sparse.core.neighbors import KernelShape
from monai_memeff.sparse.core.voxel_set import VoxelSet
from tests.sparse.reference import (
    DenseConv,
    DenseConvTranspose,
    Size,
    assert_convolution_is_dense,
    assert_transposed_is_dense,
    convolve_by_dictionary,
    fine_and_coarse,
    random_mask,
    set_of,
    triple,
)

SHAPE = (7, 6, 9)
CUBE = KernelShape((3, 3, 3), padding=(1, 1, 1))


def rows_of(found: KernelMap) -> set[tuple[int, int, int]]:
    """(offset, input row, output row) of every pair."""
    pairs = enumerate(found.each_pair())
    return {(offset, i, o) for offset, (ins, outs) in pairs for i, o in zip(ins.tolist(), outs.tolist(), strict=True)}


def rows_by_loops(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> set[tuple[int, int, int]]:
    """The definition: output o reads input ``stride * o - padding + dilation * t`` of the same batch item."""
    row = {tuple(voxel): number for number, voxel in enumerate(inputs.coordinates.tolist())}
    found = set()
    for out_row, (batch, *place) in enumerate(outputs.coordinates.tolist()):
        for offset, tap in enumerate(product(*map(range, shape.kernel_size))):
            parts = zip(shape.stride, place, shape.padding, shape.dilation, tap, strict=True)
            source = (batch, *(s * o - p + d * t for s, o, p, d, t in parts))
            if source in row:
                found.add((offset, row[source], out_row))
    return found


@pytest.mark.parametrize(
    ("span", "small", "full"),
    [(0, 0, 0), (16, 0, 0), (16, 2**14, 0), (16, 2**14, 2**20)],
    ids=["search", "table of parts", "table of the grid", "every cell a slot"],
)
@pytest.mark.parametrize("cost", [0, 10**6])
def test_both_layouts_and_all_look_ups(
    span: int, small: int, full: int, cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_lists, "TABLE_SPAN", span)  # 0: binary search
    monkeypatch.setattr(key_lists, "SMALL_GRID", small)
    monkeypatch.setattr(key_lists, "is_small", lambda cells, _keys: cells <= span * small)
    monkeypatch.setattr(neighbors, "FULL_SPAN", 0)
    monkeypatch.setattr(neighbors, "FULL_CELLS", full)
    monkeypatch.setattr(kernel_map, "PAIR_COST", cost)
    monkeypatch.setattr(kernel_map, "SMALL_TABLE", 0)  # 0: pairs wherever possible; large: tables
    mask = random_mask(3, SHAPE, 0.3, empty_item=1)
    for kernel, stride in ((3, 1), (4, 1), (3, 2), (2, 2), (5, 3)):
        sparse = SparseConv3d(3, 4, kernel, stride).double(), SparseConvTranspose3d(3, 4, kernel, stride).double()
        assert_convolution_is_dense(sparse[0], DenseConv(3, 4, kernel, stride), mask)
        assert_transposed_is_dense(sparse[1], DenseConvTranspose(3, 4, kernel, stride), mask)


@pytest.mark.parametrize("stride", [2, (1, 2, 3)])
def test_whole_cells_are_generated_as_clipped_ones_are(stride: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    _, coarse = fine_and_coarse(random_mask(2, (4, 6, 12), 0.1, empty_item=1), stride)
    shape = KernelShape(triple(stride), triple(stride))
    whole = generate.generate(coarse, shape)
    monkeypatch.setattr(generate, "_fills_whole_cells", lambda *_: False)
    coarse._generated.clear()  # both call it by the same name
    assert torch.equal(whole.keys, generate.generate(coarse, shape).keys)
    assert len(whole) == len(coarse) * shape.volume


@pytest.mark.parametrize("cost", [0, 10**6])
@pytest.mark.parametrize("full", [0, 2**20], ids=["looked up", "every cell a slot"])
def test_pairs_are_those_of_the_definition(full: int, cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "FULL_CELLS", full)
    monkeypatch.setattr(kernel_map, "PAIR_COST", cost)
    monkeypatch.setattr(kernel_map, "SMALL_TABLE", 0)
    fine, coarse = fine_and_coarse(random_mask(2, SHAPE, 0.3), (1, 2, 3))
    shapes = [
        (fine, fine, CUBE),
        (fine, fine, KernelShape((2, 4, 1), padding=(0, 1, 0))),
        (fine, fine, KernelShape((3, 3, 2), dilation=(1, 2, 3), padding=(1, 2, 1))),
        (fine, coarse, KernelShape((3, 2, 5), (1, 2, 3), (2, 1, 1), (2, 0, 2))),
    ]
    for inputs, outputs, shape in shapes:
        found = plan_kernel_map(inputs, outputs, shape)
        expected = rows_by_loops(inputs, outputs, shape)
        assert rows_of(found) == expected
        assert (found.num_pairs, found.num_in, found.num_out) == (len(expected), len(inputs), len(outputs))
        assert found.num_offsets == shape.volume == torch.Size(shape.kernel_size).numel()
        assert (found.table is None) != (found.pairs is None)
        back = found.transposed
        mirrored = {(found.num_offsets - 1 - n if back.flipped else n, o, i) for n, i, o in expected}
        assert rows_of(back) == mirrored
        assert back.num_pairs == len(expected)


def test_symmetric_maps_are_their_own_transpose() -> None:
    fine, _ = fine_and_coarse(random_mask(2, SHAPE, 0.3), 2)
    found = plan_kernel_map(fine, fine, CUBE)
    assert found.transposed.table is found.table
    assert found.transposed.transposed.flipped == found.flipped


def test_neighbor_rows_tell_the_same_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered, scattered and paired maps, flipped ones too: the input row of every output row and offset."""
    monkeypatch.setattr(kernel_map, "SMALL_TABLE", 0)
    fine, coarse = fine_and_coarse(random_mask(2, SHAPE, 0.3), 2)
    maps = [
        plan_kernel_map(fine, fine, CUBE),
        plan_kernel_map(fine, coarse, KernelShape((2, 2, 2), (2, 2, 2))),
        plan_kernel_map(fine, coarse, KernelShape((3, 3, 3), (2, 2, 2), padding=(1, 1, 1))),
    ]
    layouts = []
    for found in [*maps, *(each.transposed for each in maps)]:
        rows = found.neighbor_rows()
        assert (rows.dtype, tuple(rows.shape)) == (torch.int32, (found.num_offsets, found.num_out))
        present = (rows < found.num_in).nonzero().tolist()
        told = {(offset, int(rows[offset, out]), out) for offset, out in present}
        order = (lambda n, last=found.num_offsets - 1: last - n) if found.flipped else (lambda n: n)
        assert told == {(order(offset), i, o) for offset, i, o in rows_of(found)}
        assert len(told) == found.num_pairs
        layouts.append("pairs" if found.table is None else "scatter" if found.scatters else "gather")
    assert set(layouts) == {"gather", "scatter", "pairs"}


def test_a_line_of_three_neighbors_takes_one_number() -> None:
    fine, coarse = fine_and_coarse(random_mask(2, SHAPE, 0.3), 2)
    table = plan_kernel_map(fine, fine, CUBE).table
    assert tuple(table.entries.shape) == (len(fine), 9)
    assert table.window == 3
    strided = plan_kernel_map(fine, coarse, KernelShape((2, 2, 2), (2, 2, 2)))
    assert tuple(strided.table.entries.shape) == (len(coarse), 8)
    assert strided.transposed.table is strided.table  # read the other way


@pytest.mark.parametrize("occupancy", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 2, 5), (3, 3, 1)])
def test_windows_hold_the_rows_of_a_line(occupancy: float, kernel: tuple[int, int, int]) -> None:
    fine, _ = fine_and_coarse(random_mask(2, SHAPE, occupancy), 2)
    shape = KernelShape(kernel, padding=tuple((k - 1) // 2 for k in kernel))
    found = plan_kernel_map(fine, fine, shape)
    features = torch.randn(len(fine), 2)
    windows = found.table.windows(features)
    gathered = windows[found.table.entries.long()].view(len(fine), shape.volume, 2)
    padded = torch.cat((features, torch.zeros(1, 2)))
    for offset, rows in enumerate(found.neighbor_rows()):
        assert torch.equal(gathered[:, offset], padded[rows.long()])


def test_generated_voxels_and_their_map_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = count_plans(monkeypatch)
    x = SparseTensor.from_dense(torch.ones(2, 2, *SHAPE), random_mask(2, SHAPE, 0.3))
    grow = SparseConvTranspose3d(2, 2, generative=True)
    first, second = grow(x), grow(x)
    assert first.voxels is second.voxels
    (first + second).features.sum().backward()
    assert len(planned) == 1


def test_empty_sets_have_maps_without_pairs() -> None:
    fine, coarse = fine_and_coarse(torch.zeros(2, 1, *SHAPE, dtype=torch.bool), 2)
    for outputs, stride in ((fine, 1), (coarse, 2)):
        found = plan_kernel_map(fine, outputs, KernelShape((3, 3, 3), (stride,) * 3, padding=(1, 1, 1)))
        assert (found.num_pairs, found.num_in, found.num_out) == (0, 0, 0)
        assert found.transposed.num_pairs == 0


def count_plans(monkeypatch: pytest.MonkeyPatch) -> list[KernelShape]:
    """The geometries planned from now on."""
    planned = []
    plan = kernel_map.plan_kernel_map

    def counting(inputs: VoxelSet, outputs: VoxelSet, shape: KernelShape) -> KernelMap:
        planned.append(shape)
        return plan(inputs, outputs, shape)

    monkeypatch.setattr(kernel_map, "plan_kernel_map", counting)
    return planned


def test_a_level_plans_once_for_all_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = count_plans(monkeypatch)
    x = SparseTensor.from_dense(torch.ones(2, 4, *SHAPE), random_mask(2, SHAPE, 0.3))
    first, second = SparseConv3d(4, 4), SparseConv3d(4, 4)
    down, middle, up = SparseConv3d(4, 4, 3, 2), SparseConv3d(4, 4), SparseConvTranspose3d(4, 4, 3, 2)
    for _ in range(2):
        fine = second(first(x))
        coarse = middle(middle(down(fine)))
        result = SparseConv3d(4, 2, 1)(second(fine + up(coarse)))
        result.features.sum().backward()
        kept = coarse.voxels  # while somebody holds the coarse level, its plans stay
    assert len(kept) > 0
    strided = KernelShape((3, 3, 3), (2, 2, 2), padding=(1, 1, 1))
    assert sorted(map(repr, planned)) == sorted(map(repr, [CUBE, strided, CUBE]))


def test_one_map_object_serves_forward_and_backward() -> None:
    fine, coarse = fine_and_coarse(random_mask(2, SHAPE, 0.3), 2)
    strided = KernelShape((3, 3, 3), (2, 2, 2), padding=(1, 1, 1))
    for inputs, outputs, shape in ((fine, fine, CUBE), (fine, coarse, strided)):
        found = kernel_map.kernel_map_between(inputs, outputs, shape)
        assert kernel_map.kernel_map_between(inputs, outputs, shape) is found
        assert found.transposed is found.transposed
    other = fine.with_keys(fine.keys[::2])
    assert kernel_map.kernel_map_between(fine, other, CUBE) is not kernel_map.kernel_map_between(fine, other, CUBE)


def test_a_family_of_levels_is_freed_without_the_garbage_collector() -> None:
    def run() -> list[Callable[[], object]]:
        x = SparseTensor.from_dense(torch.ones(1, 2, *SHAPE), random_mask(1, SHAPE, 0.3))
        net = nn.Sequential(SparseConv3d(2, 2), SparseConv3d(2, 2, 2, 2), SparseConvTranspose3d(2, 2, generative=True))
        levels, y = [x.voxels], x
        for layer in net:
            y = layer(y)
            levels.append(y.voxels)
        (y + x).features.sum().backward()
        maps = [plan for level in levels for plan in level._plans.values()]
        assert any(isinstance(plan, KernelMap) for plan in maps)
        return [weakref.ref(thing) for thing in [*levels, *maps, x.features]]

    gc.disable()
    try:
        assert [ref() for ref in run() if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (3, 1, 3), (2, 2, 1), ((3, 1, 2), (1, 2, 2), 1), (5, 3, 2)]
)
def test_corners_of_a_huge_grid(kernel: Size, stride: Size, dilation: Size) -> None:
    """Extents of 2^18 and keys up to nearly 2^63, against a dictionary."""
    edge = 2**18
    near = torch.randint(0, 4, (120, 3)) + torch.randint(0, 2, (120, 3)) * (edge - 4)
    items = torch.tensor([0, 1, 510])[torch.randint(0, 3, (120, 1))]
    last = torch.tensor([[510, edge - 1, edge - 1, edge - 1]])
    places = torch.cat((torch.cat((items, near), dim=1), last)).unique(dim=0)
    x = SparseTensor(torch.randn(len(places), 2).double(), places, (edge,) * 3, batch_size=511)
    assert int(x.voxels.keys[-1]) == 511 * 2**54 - 1
    assert torch.equal(x.coordinates, places)
    layer = SparseConv3d(2, 3, kernel, stride, dilation).double()
    y = layer(x)
    expected = {(b, *(c // s for c, s in zip(place, triple(stride), strict=True))) for b, *place in places.tolist()}
    assert set_of(y) == expected
    rows = {tuple(place): value for place, value in zip(places.tolist(), x.features, strict=True)}
    reference = convolve_by_dictionary(rows, expected, layer.weight, layer.bias, stride, dilation)
    for place, value in zip(y.coordinates.tolist(), y.features, strict=True):
        torch.testing.assert_close(value, reference[tuple(place)], rtol=0, atol=1e-10)


def test_generative_at_the_corners_of_a_huge_grid() -> None:
    edge = 2**18
    x = SparseTensor(torch.ones(2, 1), torch.tensor([[0, 0, 0, 0], [0, edge - 1, edge - 1, edge - 2]]), (edge,) * 3)
    made = SparseConvTranspose3d(1, 1, 3, generative=True)(SparseConv3d(1, 1, 2, 2)(x))
    near, far = product((0,), *[(0, 1)] * 3), product((0,), *[(edge - 3, edge - 2, edge - 1)] * 3)
    assert set_of(made) == set(near) | set(far)


def test_a_grid_that_outgrows_the_keys_is_refused() -> None:
    one = torch.tensor([[511, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"at most 2\^63 - 1.*smaller batch"):
        SparseTensor(torch.ones(1, 1), one, (2**18,) * 3)
    wide = SparseTensor(torch.ones(1, 1), torch.tensor([[0, 1, 1, 1]]), (2**18, 2**18, 2**17), batch_size=1023)
    with pytest.raises(ValueError, match=r"2\^63"):
        SparseConv3d(1, 1, 5, dilation=2**10)(wide)
    with pytest.raises(ValueError, match="between 1 and 262144"):
        SparseConvTranspose3d(1, 1, 2, generative=True)(wide)


@pytest.mark.parametrize(("offsets", "bits"), [(27, 62), (27, 32), (8, 62), (62, 62), (125, 62), (63, 62), (1, 32)])
@pytest.mark.parametrize("block", [2**22, 500])
def test_the_offsets_of_a_row_are_bits(offsets: int, bits: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "BLOCK_ELEMENTS", block)
    rows = torch.randint(0, 9, (offsets, 50), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    shared = -(-offsets // bits)
    expected = [
        sum(1 << bit for bit in {t // shared for t, row in enumerate(column) if row < 5})
        for column in rows.t().tolist()
    ]
    assert masks.offset_masks(rows, 5, bits).tolist() == expected

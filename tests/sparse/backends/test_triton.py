"""Our Triton engine beyond parity: sorted rows, tiles, splits, 64-bit addresses, precision, second derivatives."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_memeff.sparse.backends import native
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry, KernelMap
from tests.sparse.backends.cases import (
    GEOMETRIES,
    assert_equals_native,
    back,
    convolution,
    generative,
    random_tensors,
    results,
)

pytest.importorskip("triton", reason="Triton comes with the extra [triton], on Linux")

import triton
import triton.language as tl

from monai_memeff.sparse.backends import triton as engine
from monai_memeff.sparse.backends.triton import kernels, launch, rows, tuning
from monai_memeff.sparse.backends.triton.tuning import Blocks

pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton was imported without TRITON_INTERPRET=1")


@triton.jit
def count(limit, out):
    """A loop whose end is read from memory, as our kernels have."""
    for number in range(tl.load(limit)):
        tl.store(out + number, number)


@pytest.fixture(autouse=True, scope="module")
def _an_interpreter_that_counts() -> None:
    """Triton 3.6's takes a tensor of one value for a number, which numpy refuses from 2.4 on."""
    try:
        count[(1,)](torch.tensor([2]), torch.zeros(2))
    except triton.runtime.errors.InterpreterError:
        pytest.skip(f"Triton {triton.__version__} and numpy {np.__version__}: the interpreter cannot run a loop")


@pytest.mark.parametrize("kind", [kind for kind in GEOMETRIES if kind != "3^3 on nothing"])
def test_the_plan_has_every_pair_once(kind: str) -> None:
    kernel_map = GEOMETRIES[kind]().kernel_map
    for number, direction in enumerate((kernel_map, kernel_map.transposed)):
        plan = rows.row_plan(direction)
        assert sorted(plan.order.tolist()) == list(range(direction.num_out)), number
        for offset, (ins, outs) in enumerate(direction.each_pair()):
            present = plan.table[offset] < direction.num_in
            found = set(zip(plan.table[offset][present].tolist(), plan.order[present].tolist(), strict=True))
            assert found == set(zip(ins.tolist(), outs.tolist(), strict=True))


@pytest.mark.parametrize("size", [1, 16, 1000])
def test_tiles_list_what_occurs(size: int) -> None:
    plan = rows.row_plan(convolution(3).kernel_map)
    tiles, present = plan.tiles(size), plan.table < plan.num_in
    assert plan.tiles(size) is tiles
    occurs = [
        {t for t, row in enumerate(present[:, start : start + size]) if row.any()}
        for start in range(0, len(plan.order), size)
    ]
    for number, offsets in enumerate(occurs):
        listed = tiles.of_tile[0][number][: tiles.of_tile[1][number]].tolist()
        assert listed == sorted(offsets)
    for offset in range(27):
        listed = tiles.of_offset[0][offset][: tiles.of_offset[1][offset]].tolist()
        assert listed == [number for number, offsets in enumerate(occurs) if offset in offsets]


def test_sorting_lets_tiles_skip_offsets() -> None:
    """Every fine voxel of a transposed 2^3 kernel has one offset: a tile has few of the eight."""
    plan = rows.row_plan(back(2, occupancy=1.0).kernel_map)
    assert float(plan.tiles(16).of_tile[1].float().mean()) < 2.5
    masks = (plan.table < plan.num_in).long().t() @ (2 ** torch.arange(8))
    assert bool((masks.diff() >= 0).all())


def test_plans_are_made_once_and_shared() -> None:
    """A submanifold map and its transpose read one table; both directions of a 2^3 kernel have their own."""
    symmetric = convolution(3).kernel_map
    assert rows.row_plan(symmetric) is rows.row_plan(symmetric.transposed)
    halving = convolution(2, 2).kernel_map
    assert rows.row_plan(halving) is rows.row_plan(halving)
    assert rows.row_plan(halving) is not rows.row_plan(halving.transposed)


def test_plans_are_freed_with_their_map() -> None:
    geometry = convolution(3)
    before = len(rows._plans)
    rows.row_plan(geometry.kernel_map)
    assert len(rows._plans) == before + 1
    del geometry
    assert len(rows._plans) == before


@pytest.mark.slow
def test_kernels_with_more_points_than_bits() -> None:
    """A 5^3 kernel has 125: several offsets share a bit of the number by which rows are sorted."""
    plan = rows.row_plan(convolution(5).kernel_map)
    assert len(plan.table) == 125
    assert_equals_native(engine, convolution((5, 5, 3)))


@pytest.mark.parametrize("blocks", [Blocks(16, 16, 16, 4, 1), Blocks(64, 32, 16, 4, 1), Blocks(16, 64, 64, 4, 1)])
@pytest.mark.slow
def test_block_sizes_do_not_change_the_result(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "choose", lambda *_args, **_kwargs: blocks)
    for geometry in (convolution(2, 2), back(3)):
        assert_equals_native(engine, geometry, (20, 33))


@pytest.mark.slow
def test_the_splits_of_the_weight_gradient_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = convolution(3)
    monkeypatch.setattr(tuning, "choose", lambda *_args, **_kwargs: Blocks(16, 16, 16, 4, 1))
    tensors = random_tensors(geometry, 3, 5)
    found = []
    for splits in (1, 2, 5):
        monkeypatch.setattr(launch, "INTERPRETED_SPLITS", splits)
        found.append(results(engine, geometry, tensors)["weight"])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    assert_equals_native(engine, geometry)


@pytest.mark.slow
def test_64_bit_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INT32_ELEMENTS", 10)
    for geometry in (convolution(3), back(2)):
        assert_equals_native(engine, geometry)


@pytest.mark.slow
def test_results_are_the_same_at_every_run() -> None:
    geometry = convolution(3)
    tensors = random_tensors(geometry, 8, 8)
    first, second = results(engine, geometry, tensors), results(engine, geometry, tensors)
    assert all(torch.equal(first[part], second[part]) for part in first)


def test_float32_is_ieee_unless_torch_allows_tf32() -> None:
    """The flag is put back after every test."""
    assert launch._precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert launch._precision(torch.float32) == "tf32"
    assert launch._precision(torch.bfloat16) == "ieee"


def test_float64_is_computed_by_native(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = convolution(3)
    tensors = random_tensors(geometry, 2, 3, torch.float64)
    monkeypatch.setattr(launch, "multiply", None)
    ours, reference = results(engine, geometry, tensors), results(native, geometry, tensors)
    assert all(torch.equal(ours[part], reference[part]) for part in reference)


@pytest.mark.parametrize("geometry", [convolution(3), convolution(2, 2)], ids=["3^3", "2^3"])
@pytest.mark.slow
def test_second_derivatives(geometry: ConvolutionGeometry) -> None:
    """The gradient of a gradient penalty equals native's."""

    def penalty(convolve: object) -> tuple[Tensor, ...]:
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        out = convolve(x, w, None, geometry)
        grads = torch.autograd.grad(out.square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, w))

    features, weight, _, _ = random_tensors(geometry, 2, 3)
    for ours, reference in zip(penalty(engine.convolve), penalty(native.convolve), strict=True):
        assert float((ours - reference).abs().max()) <= 1e-5 * float(reference.abs().max())


@pytest.mark.exhaustive
def test_without_the_interpreter_the_cpu_is_refused() -> None:
    code = (
        "import torch; from monai_memeff.sparse import backends;"
        "print(backends.status('cpu')['triton']); print(backends.chosen('cpu'))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code.replace("import torch;", "import os, torch; os.environ['TRITON_INTERPRET'] = '0';"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    reason, chosen = done.stdout.strip().splitlines()[-2:]
    assert reason.startswith("Triton compiles for GPUs, not for cpu tensors; with TRITON_INTERPRET=1")
    assert chosen == "native"


def test_a_map_held_in_pairs() -> None:
    """Most rows of a large stride meet few offsets: such maps have no table."""
    geometry = generative(4, 3)
    kernel_map = KernelMap(
        geometry.kernel_map.num_in,
        geometry.kernel_map.num_out,
        geometry.kernel_map.num_offsets,
        pairs=list(geometry.kernel_map.each_pair()),
    )
    assert torch.equal(rows.row_plan(kernel_map).table, rows.row_plan(geometry.kernel_map).table)

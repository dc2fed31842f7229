"""spconv's tables from our kernel maps, and the call itself, against a stand-in that computes what spconv documents."""

from __future__ import annotations

import re
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_memeff.sparse.backends import implicit_gemm, native
from monai_memeff.sparse.kernel_map import ConvolutionGeometry
from tests.sparse.backends.cases import GEOMETRIES, assert_equals_native, convolution, random_tensors

KINDS = [kind for kind in GEOMETRIES if "5^3" not in kind and "4^3" not in kind]


class _StandIn(torch.autograd.Function):
    """The forward and backward passes by the tables they are given, written plainly."""

    calls: list[tuple] = []

    @staticmethod
    def forward(ctx: object, features: Tensor, filters: Tensor, *rest: object) -> Tensor:
        _StandIn.calls.append((features, filters, *rest))
        pairs, back, masks, back_masks, orders, back_orders, num_out, groups, _, submanifold, timer, sums = rest
        assert features.is_contiguous()
        assert filters.is_contiguous()
        assert not submanifold
        assert timer is False
        assert sums is (True if features.dtype == torch.float16 else None)
        assert [group.dtype for group in groups] == [np.uint32]
        ctx.save_for_backward(features, filters)
        ctx.tables = (pairs, masks[0], orders[0]), (back, back_masks[0], back_orders[0])
        weight = filters.flatten(1, 3).permute(1, 2, 0)
        return _through(ctx.tables[0], features, weight, num_out)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple:
        features, filters = ctx.saved_tensors
        weight = filters.flatten(1, 3).permute(1, 0, 2)
        grad_features = _through(ctx.tables[1], grad, weight, len(features))
        pairs = ctx.tables[0][0]
        parts = [features[row[row >= 0].long()].t() @ grad[row >= 0] for row in pairs]
        grad_filters = torch.stack(parts).permute(2, 0, 1).reshape(filters.shape)
        return (grad_features, grad_filters, *[None] * 12)


def _through(table: tuple[Tensor, Tensor, Tensor], features: Tensor, weight: Tensor, num_out: int) -> Tensor:
    """Gather and multiply, row by row in the order of the masks, skipping what the masks say is absent."""
    pairs, mask, order = table
    assert (pairs.dtype, mask.dtype, order.dtype) == (torch.int32,) * 3
    assert mask.shape == (num_out, 1)
    out = features.new_zeros(num_out, weight.shape[2], dtype=torch.float32)
    for offset, row in enumerate(pairs):
        marked = order[(mask[:, 0].long() >> offset) & 1 == 1].long()
        assert bool((row[marked] >= 0).all())
        assert int((row >= 0).sum()) == len(marked)
        out[marked] += features[row[marked].long()].float() @ weight[offset].float()
    return out.to(features.dtype)


@pytest.fixture
def engine() -> types.SimpleNamespace:
    """An engine with the stand-in for a library."""
    _StandIn.calls.clear()
    library = types.SimpleNamespace(SparseImplicitGemmFunction=_StandIn, CUDAKernelTimer=lambda enabled: enabled)
    return types.SimpleNamespace(convolve=lambda *arguments: implicit_gemm.convolve("stand-in", library, *arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_say_what_our_maps_say(kind: str, engine: types.SimpleNamespace) -> None:
    geometry = GEOMETRIES[kind]()
    assert_equals_native(engine, geometry)
    assert len(_StandIn.calls) == (0 if kind == "3^3 on nothing" else 1)


def test_half_precision(engine: types.SimpleNamespace) -> None:
    assert_equals_native(engine, convolution(3), (8, 16), torch.float16)


def test_masks_are_sorted_and_have_32_bits() -> None:
    for kind, kernel in (("3^3", 3), ("4x4x2", (4, 4, 2))):
        rows = implicit_gemm.rows_of(convolution(kernel, occupancy=1.0).kernel_map)
        unsigned = rows.mask[:, 0].long() & 0xFFFFFFFF
        assert bool((unsigned.diff() >= 0).all()), kind
        assert sorted(rows.order.tolist()) == list(range(len(rows.order)))
    assert int(unsigned.max()) == 2**32 - 1


def test_making_tables_leaves_the_map_alone() -> None:
    """A table of one column could be the map's own memory."""
    kernel_map = convolution(1, 2).kernel_map
    before = kernel_map.neighbour_rows().clone()
    implicit_gemm.rows_of(kernel_map)
    assert torch.equal(kernel_map.neighbour_rows(), before)


def test_tables_are_made_once(engine: types.SimpleNamespace) -> None:
    geometry = convolution(3)
    for _ in range(2):
        assert_equals_native(engine, geometry)
    first, second = _StandIn.calls
    assert first[2] is second[2]
    assert first[3] is second[3]


def test_no_table_for_the_way_back_without_gradients(engine: types.SimpleNamespace) -> None:
    geometry = convolution(2, 2)
    with torch.no_grad():
        engine.convolve(*random_tensors(geometry, 3, 5)[:3], geometry)
    assert _StandIn.calls[0][10] is False
    assert "transposed" not in vars(geometry.kernel_map)


def test_weights_turn_output_channels_first() -> None:
    geometry = convolution((3, 1, 2))
    weight = torch.arange(6 * 4 * 5.0).view(6, 4, 5)
    turned = implicit_gemm.output_channels_first(weight, geometry)
    assert turned.shape == (5, 3, 1, 2, 4)
    assert torch.equal(turned[:, 2, 0, 1, :], weight[5].t())


@pytest.mark.parametrize(
    ("make", "dtype", "reason"),
    [
        (lambda: convolution(4), torch.float32, r"kernels of more than 32 points, got \(4, 4, 4\)"),
        (lambda: convolution(3), torch.bfloat16, r"no kernels for torch\.bfloat16"),
        (lambda: convolution(3), torch.float64, r"no kernels for torch\.float64"),
    ],
)
def test_what_it_has_no_kernel_for_is_left_to_native_and_said_once(
    make: Callable[[], ConvolutionGeometry],
    dtype: torch.dtype,
    reason: str,
    engine: types.SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(implicit_gemm, "_logged", set())
    geometry = make()
    tensors = random_tensors(geometry, 3, 5, dtype)[:3]
    for _ in range(2):
        assert torch.equal(engine.convolve(*tensors, geometry), native.convolve(*tensors, geometry))
    assert not _StandIn.calls
    assert len(caplog.messages) == 1
    assert re.search(reason, caplog.messages[0])


def test_addresses_beyond_32_bits_are_left_to_native(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = convolution(3)
    features, weight, _, _ = random_tensors(geometry, 3, 40)
    assert implicit_gemm.declined(features, weight, geometry) is None
    monkeypatch.setattr(implicit_gemm, "MAX_ELEMENTS", 40 * len(features) - 1)
    assert "beyond 32-bit addresses" in str(implicit_gemm.declined(features, weight, geometry))

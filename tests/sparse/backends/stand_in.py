"""A stand-in for ``spconv.pytorch.functional``: the contract of its implicit GEMM, asserted and computed by torch.

The contract, the same in spconv 2.3 and spconv-triton 1.0: weights (out, k, k, k, in); for each direction a table
(offsets, rows) of int32 with -1 for no neighbor, a mask of 32 bits for every row, in int32 (rows, 1), sorted, and the
row of every mask; on the host one group of offsets, uint32. A tile of rows reads the offsets that any of its masks has;
the forward pass notes them for the gradient of the weights. Tables are saved for backward, as features and weights are.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 8
"""Output rows that share a mask; 32 or more in the libraries, fewer here so that tests have several."""

calls: list[SimpleNamespace] = []
"""What the forward passes were given, as far as tests ask."""


class CUDAKernelTimer:
    """Disabled, or it would need a GPU."""

    def __init__(self, enable: bool = True) -> None:
        self.enable = enable


class Table(NamedTuple):
    """One direction: what a kernel is given."""

    pairs: Tensor
    mask: Tensor
    order: Tensor

    def check(self, offsets: int, rows: int, others: int) -> None:
        """``others``: rows on the other side."""
        sizes = (offsets, rows), (rows, 1), (rows,)
        for tensor, size in zip(self, sizes, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.int32, size)
            assert tensor.is_contiguous()
        assert offsets <= 32, "one word"
        assert int(self.pairs.min()) >= -1
        assert int(self.pairs.max()) < others
        assert self.order.sort()[0].tolist() == list(range(rows))
        words = self.mask[:, 0].long() & 0xFFFFFFFF
        assert bool((words.diff() >= 0).all()), "sorted as unsigned numbers"
        bits = ((self.pairs >= 0).long() << torch.arange(offsets)[:, None]).sum(0)
        assert torch.equal(words, bits[self.order.long()])

    def tiles(self) -> list[tuple[Tensor, int]]:
        """Rows of every tile, and the offsets that any of them has."""
        words = (self.mask[:, 0].long() & 0xFFFFFFFF).split(TILE)
        rows = self.order.long().split(TILE)
        return [(r, int(np.bitwise_or.reduce(w.numpy()))) for r, w in zip(rows, words, strict=True)]


class SparseImplicitGemmFunction(torch.autograd.Function):
    """Both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        filters: Tensor,
        pair_fwd: Tensor,
        pair_bwd: Tensor,
        pair_mask_fwd_splits: list[Tensor],
        pair_mask_bwd_splits: list[Tensor],
        mask_argsort_fwd_splits: list[Tensor],
        mask_argsort_bwd_splits: list[Tensor],
        num_activate_out: int,
        masks: list[np.ndarray],
        is_train: bool,
        is_subm: bool,
        timer: CUDAKernelTimer,
        fp32_accum: bool | None = None,
        bias: Tensor | None = None,
        act_alpha: float = 0.0,
        act_beta: float = 0.0,
        act_type: object = None,
    ) -> Tensor:
        calls.append(SimpleNamespace(pair_fwd=pair_fwd, pair_bwd=pair_bwd, is_train=is_train))
        _check_dense(features, filters)
        assert type(num_activate_out) is int
        assert type(is_train) is bool
        assert is_subm is False, "one table for both directions: results would start without a value"
        assert not timer.enable
        assert fp32_accum is (True if features.dtype == torch.float16 else None)
        assert bias is None, "it would have no gradient"
        assert [(group.dtype, group.tolist()) for group in masks] == [(np.uint32, [2**32 - 1])]
        weight = filters.flatten(1, 3).permute(1, 2, 0)
        there = Table(pair_fwd, *pair_mask_fwd_splits, *mask_argsort_fwd_splits)
        there.check(len(weight), num_activate_out, len(features))
        ctx.tables = None
        if is_train:
            back = Table(pair_bwd, *pair_mask_bwd_splits, *mask_argsort_bwd_splits)
            back.check(len(weight), len(features), num_activate_out)
            _check_inverse(there.pairs, back.pairs)
            ctx.tables = there, back
        ctx.save_for_backward(features, filters, pair_fwd, pair_bwd)
        out, ctx.noted = _multiply(there, features, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, filters, pair_fwd, _ = ctx.saved_tensors
        assert ctx.tables is not None, "it was told that this is not training"
        there, back = ctx.tables
        weight = filters.flatten(1, 3).permute(1, 0, 2)
        grad_features, _ = _multiply(back, grad, weight)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32)
        for (rows, _), noted in zip(there.tiles(), ctx.noted, strict=True):
            for offset in _offsets(noted):
                grad_weight[offset] += grad[rows].float().t() @ _gathered(features, pair_fwd[offset, rows])
        grad_filters = grad_weight.transpose(0, 1).reshape(filters.shape).to(filters.dtype)
        return grad_features, grad_filters, *[None] * 16


def _check_dense(features: Tensor, filters: Tensor) -> None:
    assert features.dtype in (torch.float32, torch.float16), "no kernels"
    assert features.dtype == filters.dtype
    assert (features.ndim, filters.ndim) == (2, 5)
    assert features.is_contiguous()
    assert filters.is_contiguous()
    assert filters.shape[4] == features.shape[1]
    assert not torch.is_autocast_enabled("cpu"), "it would cast to float16"


def _check_inverse(pairs: Tensor, back: Tensor) -> None:
    """Each says, offset by offset, what the other says."""
    for offset in range(len(pairs)):
        (outputs,), (inputs,) = ((side[offset] >= 0).nonzero(as_tuple=True) for side in (pairs, back))
        assert len(outputs) == len(inputs)
        assert torch.equal(back[offset, pairs[offset, outputs].long()].long(), outputs)


def _offsets(bits: int) -> list[int]:
    return [offset for offset in range(32) if bits >> offset & 1]


def _gathered(features: Tensor, rows: Tensor) -> Tensor:
    """Float32 rows, zeros where there is none."""
    return features[rows.clamp_min(0).long()].float() * (rows >= 0)[:, None]


def _multiply(table: Table, features: Tensor, weight: Tensor) -> tuple[Tensor, list[int]]:
    """Tile by tile: the result, and the offsets of every tile."""
    out = torch.zeros(table.pairs.shape[1], weight.shape[2])
    tiles = table.tiles()
    for rows, bits in tiles:
        for offset in _offsets(bits):
            out[rows] += _gathered(features, table.pairs[offset, rows]) @ weight[offset].float()
    return out.to(features.dtype), [bits for _, bits in tiles]

"""Matrix products of blocks of rows: how large a block is, and which library multiplies it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""Elements of one gathered block: at most four megabytes in float32 stay in a shared cache."""

MIN_BLOCK_ROWS = 512

MIN_BLOCKS = 4
"""A few rows are cut into this many blocks too, so that a block is small beside the features."""

PLANNED_ROWS = 256
"""Rows of the smallest block that is worth a plan of oneDNN's ..."""

PLANNED_ELEMENTS = 2**17
"""... and its elements, about: halving further costs more calls than the better product saves."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of ``dtype`` are summed: float32 at least."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def add_product(total: Tensor, a: Tensor, b: Tensor, rows: int) -> None:
    """Add ``a @ b`` of a block of rows in place; ``total`` is in the :func:`accumulator` dtype.

    In float32 on the CPU oneDNN multiplies, which uses 512-bit vectors on every processor that has them; torch's own
    BLAS does so on Intel's only. oneDNN plans every new shape, so it gets blocks of 2^n rows and torch the last few.
    """
    planned = rows >= PLANNED_ROWS and rows & (rows - 1) == 0
    if total.dtype != a.dtype:
        total += a @ b
    elif planned and a.dtype == torch.float32 and a.device.type == "cpu" and has_onednn():
        total += torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    else:
        total.addmm_(a, b)


@functools.cache
def has_onednn() -> bool:
    """Whether torch has oneDNN's matrix product, and it gives what torch's own gives."""
    own = torch.Generator().manual_seed(0)  # a seeded training stays the same whenever this is called first
    a, b = torch.randn(24, 18, generator=own, device="cpu"), torch.randn(18, 16, generator=own, device="cpu")
    try:
        return torch.allclose(torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""), a @ b, atol=1e-4)
    except (AttributeError, RuntimeError):
        return False


def row_blocks(rows: int, row_elements: int, device: torch.device) -> list[slice]:
    """Row ranges whose gathered blocks fit the budget: of 2^n rows each, then halves of that, and the last few."""
    budget = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // max(row_elements, 1)
    most = max(MIN_BLOCK_ROWS, min(budget, rows // MIN_BLOCKS))
    least = max(PLANNED_ROWS, PLANNED_ELEMENTS // max(row_elements, 1))
    size, start, blocks = 1 << (most.bit_length() - 1), 0, []
    while start < rows:
        while size > max(rows - start, least):
            size //= 2
        blocks.append(slice(start, min(start + size, rows)))
        start += size
    return blocks

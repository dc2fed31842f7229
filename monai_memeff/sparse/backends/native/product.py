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

FEW_ELEMENTS = 2**18
"""Gathered elements that are multiplied at once: a megabyte in float32, and a call less costs more than its cache."""

PLANNED_WORK = 2**24
"""Multiplications of the smallest product of few rows worth a plan, 0.6 MB for each shape, and rounded rows ..."""

WIDE_ELEMENTS = 2**19
"""... but of so many weights, two megabytes, two rows are: torch's BLAS reads and writes them several times slower."""

COPIED_ELEMENTS = 2**23
"""Elements of the largest second factor for it: without 512-bit vectors oneDNN may copy it, 32 megabytes at most."""


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
    elif planned and _by_onednn(a):
        total += _onednn(a, b, None)
    else:
        total.addmm_(a, b)


def product(a: Tensor, b: Tensor, bias: Tensor | None, rows: int, work: int) -> Tensor:
    """``a @ b + bias`` for factors of :func:`rounded_rows`, by oneDNN where that many multiplications are worth it."""
    if _worth_a_plan(rows, work) and b.numel() <= COPIED_ELEMENTS and _by_onednn(a):
        return _onednn(a, b, bias)
    return a @ b if bias is None else torch.addmm(bias, a, b)


def rounded_rows(rows: int, work: int, like: Tensor) -> int:
    """To how many rows zeros are appended for :func:`product`: 2^n or 3 * 2^n, so that oneDNN plans few shapes.

    Args:
        rows: Rows of the block.
        work: Multiplications for each of them, as many as there are weights.
        like: a factor of the product, for its dtype and device.
    """
    if not _worth_a_plan(rows, work) or not _by_onednn(like):
        return rows
    step = 1 << max(rows.bit_length() - 2, 2)
    return -(-rows // step) * step


def _worth_a_plan(rows: int, work: int) -> bool:
    return rows > 1 and (work >= WIDE_ELEMENTS or rows * work >= PLANNED_WORK)


def padded(block: Tensor, rows: int, value: int = 0) -> Tensor:
    """A block (n, C) with rows of one value appended up to ``rows``."""
    missing = rows - block.shape[0]
    return torch.cat((block, block.new_full((missing, block.shape[1]), value))) if missing else block


def _by_onednn(like: Tensor) -> bool:
    """Whether oneDNN may multiply: not while a graph of the backward pass is built, which its product would leave."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and not torch.is_grad_enabled() and has_onednn()


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return result


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
    columns = max(row_elements, 1)
    budget = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"]) // columns
    most = max(MIN_BLOCK_ROWS, min(budget, max(rows // MIN_BLOCKS, FEW_ELEMENTS // columns)))
    least = max(PLANNED_ROWS, PLANNED_ELEMENTS // columns)
    size, start = 1 << (most.bit_length() - 1), 0
    blocks: list[slice] = []
    while start < rows:
        while size > max(rows - start, least):
            size //= 2
        blocks.append(slice(start, min(start + size, rows)))
        start += size
    return blocks

"""Which kernel offsets every output row uses, as bits of one number."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**22
"""Table entries that are looked at in one call, eight bytes each."""


def offset_masks(rows: Tensor, absent: int, bits: int) -> Tensor:
    """(num_offsets, n) int32 input rows -> (n,) int64, bit t set where offset t is present.

    All offsets at once: on a GPU one by one would take a hundred times the time of the arithmetic.

    Args:
        rows: ``KernelMap.neighbor_rows()``.
        absent: what stands where there is no row; larger than all others.
        bits: at most 62; of more offsets than these, neighboring ones share a bit.
    """
    columns = max(BLOCK_ELEMENTS // max(len(rows), 1), 1)
    masks = [_masks(part < absent, -(-len(rows) // bits)) for part in rows.split(columns, dim=1)]
    return masks[0] if len(masks) == 1 else torch.cat(masks)


def _masks(present: Tensor, shared: int) -> Tensor:
    """(num_offsets, n) boolean -> (n,), of as many offsets for every bit."""
    bits = torch.arange(-(-len(present) // shared), device=present.device)[:, None]
    parts = (present[first::shared].to(torch.int64) for first in range(shared))
    unions = ((part << bits[: len(part)]).sum(0) for part in parts)  # of different bits: their sum
    return reduce(torch.bitwise_or, unions)

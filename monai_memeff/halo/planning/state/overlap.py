"""Writing into memory that the same operation reads elsewhere: its result depends on the order of a kernel's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NotPartitionableError


def check_overlap(name: str, args: Sequence[Any], out: Any = None) -> None:
    """Refuse a function that writes into part of what it reads, but not element by element.

    Args:
        name: the function's name; it writes into its first argument, or into `out`.
        args: its positional arguments.
        out: the tensor it writes to, if it is not the first argument.

    Raises:
        NotPartitionableError: plain torch would read some elements before and some after they were written.
    """
    written = args[0] if out is None else out
    if not isinstance(written, torch.Tensor):
        return
    if name == "__setitem__" and _basic(args[1]):
        written = written[args[1]]
    for read in args if out is not None else args[1:]:
        if isinstance(read, torch.Tensor) and _partly(written, read):
            raise NotPartitionableError(
                f"forward writes with {name} into a tensor of shape {tuple(written.shape)} while it reads other "
                "elements of the same memory: clone() what is read"
            )


def _basic(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in entries)


def _partly(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share elements, and not each element with itself."""
    if a.layout != torch.strided or b.layout != torch.strided or not a.numel() or not b.numel():
        return False
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    same = a.stride() == b.stride()
    if same and a.shape == b.shape and a.storage_offset() == b.storage_offset():
        return False
    if a.storage_offset() > _last(b) or b.storage_offset() > _last(a):
        return False
    if not same or a.dim() != b.dim():
        return True
    dims = sorted(zip(a.stride(), a.shape, b.shape, strict=True), reverse=True)
    return _meets(b.storage_offset() - a.storage_offset(), [d for d in dims if d[0]])


def _last(x: torch.Tensor) -> int:
    return x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


def _meets(apart: int, dims: Sequence[tuple[int, int, int]]) -> bool:
    """Whether two boxes of the same strides, `apart` elements from each other, have an element in common."""
    if not dims:
        return apart == 0
    stride, mine, other = dims[0]
    reach = sum(s * (max(m, o) - 1) for s, m, o in dims[1:])
    first, last = -((reach - apart) // stride), (apart + reach) // stride  # the rest must be within reach
    steps = range(max(first, 1 - other), min(last, mine - 1) + 1)
    return any(_meets(apart - k * stride, dims[1:]) for k in steps)

"""Convolution by gathering: every output row collects its input rows through the neighbor table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from monai_memeff.sparse.backends.native.product import (
    FEW_ELEMENTS,
    accumulator,
    add_product,
    padded,
    product,
    rounded_rows,
    row_blocks,
)
from monai_memeff.sparse.core.kernel_map import KernelMap

PRODUCT_COLUMNS = 512
"""Gathered columns of one product: more of them would leave the cache, fewer would add to the total more often."""


def multiply(features: Tensor, weight: Tensor, bias: Tensor | None, kernel_map: KernelMap) -> Tensor:
    """(num_in, in_channels) -> (num_out, out_channels)."""
    if _are_few(weight, kernel_map):
        work = weight.numel()
        gathered = _gathered(features, kernel_map, rounded_rows(kernel_map.num_out, work, features))
        out = product(gathered, weight.flatten(0, 1), bias, len(gathered), work)
        return out[: kernel_map.num_out]
    out = features.new_zeros(kernel_map.num_out, weight.shape[2])
    if bias is not None:
        out += bias
    gathering = _Gathering(features, kernel_map)
    weights = gathering.split(weight.flatten(0, 1))
    for rows in gathering.blocks():
        total = out[rows].to(accumulator(out.dtype))
        for gathered, part in zip(gathering.of(rows), weights, strict=True):
            add_product(total, gathered, part, len(total))
            del gathered  # before the next one is made: one block is alive at a time, always the same memory
        if total.dtype != out.dtype:
            out[rows] = total
    return out


def weight_gradient(features: Tensor, grad: Tensor, kernel_map: KernelMap, result: Tensor) -> None:
    """Add the gradient of the weights to ``result`` (num_offsets, in_channels, out_channels)."""
    if _are_few(result, kernel_map):
        result += (_gathered(features, kernel_map, kernel_map.num_out).t() @ grad).view_as(result)
        return
    gathering = _Gathering(features, kernel_map)
    parts = gathering.split(result.view(-1, result.shape[2]))
    for rows in gathering.blocks():
        for gathered, part in zip(gathering.of(rows), parts, strict=True):
            part += gathered.t() @ grad[rows]
            del gathered


def both_gradients(features: Tensor, grad: Tensor, weight: Tensor, transposed: KernelMap) -> tuple[Tensor, Tensor]:
    """The gradients of the features, and of the weights in the :func:`accumulator` dtype."""
    if _are_few(weight.transpose(1, 2), transposed):
        return _both_gradients_of_few(features, grad, weight, transposed)
    grad_features = torch.zeros_like(features)
    gathering = _Gathering(grad, transposed)
    offsets, channels, out_channels = weight.shape
    weight = weight.transpose(1, 2).contiguous()
    weight = weight.flip(0) if transposed.flipped else weight
    weights = gathering.split(weight.flatten(0, 1))
    grad_weight = weight.new_zeros(channels, offsets * out_channels).to(accumulator(weight.dtype))
    stops = list(itertools.accumulate(map(len, weights)))
    sums = [grad_weight[:, stop - len(part) : stop] for part, stop in zip(weights, stops, strict=True)]
    for rows in gathering.blocks():
        total = grad_features[rows].to(accumulator(grad_features.dtype))
        turned = features[rows].t()
        for gathered, part, collected in zip(gathering.of(rows), weights, sums, strict=True):
            add_product(total, gathered, part, len(total))
            add_product(collected, turned, gathered, len(total))
            del gathered
        if total.dtype != grad_features.dtype:
            grad_features[rows] = total
    grad_weight = grad_weight.view(channels, offsets, out_channels)
    return grad_features, (grad_weight.flip(1) if transposed.flipped else grad_weight).transpose(0, 1)


def _both_gradients_of_few(
    features: Tensor, grad: Tensor, weight: Tensor, transposed: KernelMap
) -> tuple[Tensor, Tensor]:
    work = weight.numel()
    rows = rounded_rows(transposed.num_out, work, grad)
    gathered, turned = _gathered(grad, transposed, rows), padded(features, rows).t()
    matrix = weight.flip(0) if transposed.flipped else weight
    grad_features = product(gathered, matrix.transpose(1, 2).flatten(0, 1), None, rows, work)[: transposed.num_out]
    grad_weight = product(turned, gathered, None, rows, work).to(accumulator(weight.dtype))
    grad_weight = grad_weight.view(features.shape[1], transposed.num_offsets, -1)
    return grad_features, (grad_weight.flip(1) if transposed.flipped else grad_weight).transpose(0, 1)


def _are_few(weight: Tensor, kernel_map: KernelMap) -> bool:
    """Whether all rows that a map gathers for a weight (num_offsets, in_channels, out_channels) are one small block."""
    return kernel_map.num_out * kernel_map.num_offsets * weight.shape[1] <= FEW_ELEMENTS


def _gathered(features: Tensor, kernel_map: KernelMap, rows: int) -> Tensor:
    """(rows, num_offsets * C): what every output row reads, side by side, and rows of zeros after them."""
    assert kernel_map.table is not None
    entries = padded(kernel_map.table.entries, rows, kernel_map.table.absent)
    return kernel_map.table.windows(features).index_select(0, entries.view(-1)).view(rows, -1)


class _Gathering:
    """Blocks of gathered rows: a few lines of the kernel side by side, so that each product has enough columns."""

    def __init__(self, features: Tensor, kernel_map: KernelMap) -> None:
        assert kernel_map.table is not None
        self.entries = kernel_map.table.entries
        self.windows = kernel_map.table.windows(features)
        lines, width = self.entries.shape[1], self.windows.shape[1]
        parts = -(-lines * width // PRODUCT_COLUMNS)
        self.lines = max(1, -(-lines // parts))
        self.width = width

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Cut a matrix with one row for each gathered column into what belongs to each product."""
        return rows.split(self.lines * self.width)

    def blocks(self) -> list[slice]:
        """Ranges of output rows."""
        return row_blocks(len(self.entries), self.lines * self.width, self.entries.device)

    def of(self, rows: slice) -> Iterator[Tensor]:
        """The gathered rows of a block: (rows, columns) for each product."""
        for entries in self.entries[rows].split(self.lines, dim=1):
            yield self.windows.index_select(0, entries.flatten()).view(len(entries), -1)

"""Copies between the store and the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from monai_memeff.halo.planning.tile import Copies

PIECE = 64 * 1024
"""Bytes of adjacent memory from which on a piece is worth a copy of its own."""


class CopyStreams(Copies):
    """Two streams of a GPU for copies in the two directions, beside the one that computes.

    Memory comes from the computing stream and goes back to it: whoever drops a tensor has that stream wait first, so
    that no more is held than the plan counts.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reading, self._writing = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def read(self, copy: Callable[[], object]) -> None:
        """Read into memory that all work so far may have used."""
        self._run(self._reading, copy)

    def arrive(self) -> None:
        """The computing stream waits for all that is read."""
        torch.cuda.current_stream(self._device).wait_stream(self._reading)

    def write(self, copy: Callable[[], object]) -> None:
        """Write what the work so far has computed."""
        self._run(self._writing, copy)

    def leave(self) -> None:
        """The computing stream waits for all that is written."""
        torch.cuda.current_stream(self._device).wait_stream(self._writing)

    def _run(self, stream: torch.cuda.Stream, copy: Callable[[], object]) -> None:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            copy()


def to_device(rows: torch.Tensor, device: torch.device, copies: Copies) -> torch.Tensor:
    """Rows of a stored tensor on the device: themselves if they are there, else copied in pieces without staging."""
    if rows.device == device:
        return rows
    out = torch.empty(rows.shape, dtype=rows.dtype, device=device)
    copies.read(lambda: _copy_in(out, rows))
    return out


def _copy_in(out: torch.Tensor, rows: torch.Tensor) -> None:
    lead = _lead(rows)
    if lead is None:
        out.copy_(rows, non_blocking=rows.is_pinned())
    else:
        _copy_pieces(out, rows, lead)


def to_store(target: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows from the device into a place of a stored tensor; from a GPU they may still be on their way then.

    Between a GPU and memory of several strides torch copies by way of fresh host memory, at a fiftieth of the speed.
    """
    lead = _lead(target) if rows.device != target.device else None
    if lead is None:
        target.copy_(rows, non_blocking=rows.device.type == "cuda")
    else:
        _copy_pieces(target, rows, lead)


def _lead(rows: torch.Tensor) -> int | None:
    """Number of leading dimensions whose elements are each adjacent in pinned memory; None where that does not pay."""
    if rows.is_contiguous() or not rows.numel() or not rows.is_pinned():
        return None
    lead = 1
    while not rows[(0,) * lead].is_contiguous():
        lead += 1
    piece = rows[(0,) * lead]
    return lead if piece.numel() * piece.element_size() >= PIECE else None


def _copy_pieces(target: torch.Tensor, source: torch.Tensor, lead: int) -> None:
    for to, rows in zip(_pieces(target, lead), _pieces(source, lead), strict=True):
        to.copy_(rows, non_blocking=True)


def _pieces(tensor: torch.Tensor, lead: int) -> list[torch.Tensor]:
    """The elements of the leading dimensions, which need not be adjacent themselves."""
    found = [tensor]
    for _ in range(lead):
        found = [element for piece in found for element in piece.unbind(0)]
    return found

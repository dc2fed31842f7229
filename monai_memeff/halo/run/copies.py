"""Copies between the store and the device."""

from __future__ import annotations

import torch


def to_device(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows of a stored tensor on the device: themselves if they are there, else copied in pieces without staging."""
    if rows.device == device:
        return rows
    if rows.is_contiguous() or not rows.is_pinned():
        return rows.to(device, non_blocking=rows.is_pinned())
    out = torch.empty(rows.shape, dtype=rows.dtype, device=device)
    lead = 1
    while not rows[(0,) * lead].is_contiguous():
        lead += 1
    for source, target in zip(rows.flatten(0, lead - 1), out.flatten(0, lead - 1), strict=True):
        target.copy_(source, non_blocking=True)
    return out

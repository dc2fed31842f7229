"""What the layers need of a transport, whichever it is, and the transport of a rank that owns the whole volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Message = tuple[int, torch.Tensor]  # (peer within the spatial group, contiguous tensor)


class Pending(Protocol):
    """An exchange under way; `wait` returns the received tensors, in the order asked for."""

    def wait(self) -> list[torch.Tensor]: ...


class Communicator(Protocol):
    """What the layers need of a transport; ranks count within one spatial group.

    Attributes:
        rank: this rank's number.
        size: number of ranks that share a volume.
        sent_bytes: payload bytes sent by `exchange` so far.
        messages: messages sent by `exchange` so far.
        reductions: calls of `all_reduce` so far.
    """

    rank: int
    size: int
    sent_bytes: int
    messages: int
    reductions: int

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start sending tensors and filling buffers."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of equal shape from all ranks, by rank."""
        ...


@dataclass
class Counters:
    """Which rank this is, and what it has sent so far."""

    rank: int = 0
    size: int = 1
    sent_bytes: int = 0
    messages: int = 0
    reductions: int = 0

    def count(self, sends: Sequence[Message]) -> None:
        """Note messages."""
        self.messages += len(sends)
        self.sent_bytes += sum(t.numel() * t.element_size() for _, t in sends)


class _Done:
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor]:
        return self._tensors


class NoCommunicator(Counters):
    """One rank that owns the whole volume; messages to itself (circular padding) are copied."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Hand each sent tensor back, in order."""
        return _Done([sent for _, sent in sends][: len(receives)])

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor itself, in a list."""
        return [tensor]

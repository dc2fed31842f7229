"""What the rank executor needs of a transport, whichever it is, and the transport of a rank that is alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Message = tuple[int, torch.Tensor]  # (peer within the spatial group, contiguous tensor)


class PeerLostError(RuntimeError):
    """A rank that shares the volume stopped answering.

    Examples:
        >>> try:  # doctest: +SKIP
        ...     prediction = network(scatter(image, mesh))
        ... except PeerLostError as error:
        ...     raise SystemExit(f"resume from the last checkpoint: {error}")
    """


class Pending(Protocol):
    """An exchange under way; `wait` returns the received tensors, in the order of the request."""

    def wait(self) -> list[torch.Tensor]: ...


class Communicator(Protocol):
    """What the rank executor needs of a transport; ranks count within one spatial group.

    Attributes:
        rank: this rank's number.
        size: number of ranks that share a volume.
        sent_bytes: payload bytes sent by `exchange` so far.
        messages: messages sent by `exchange` so far.
        reductions: calls of `all_reduce` and `all_gather` so far.
    """

    rank: int
    size: int
    sent_bytes: int
    messages: int
    reductions: int

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start sending tensors and filling buffers; at most one message each way per peer."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
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
        """Add messages to the counts."""
        self.messages += len(sends)
        self.sent_bytes += sum(t.numel() * t.element_size() for _, t in sends)


class _Done:
    def wait(self) -> list[torch.Tensor]:
        return []


class SingleRank(Counters):
    """One rank that owns the whole volume: nothing is ever sent."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Nothing to do: rows that a rank needs of itself are copied without the transport."""
        return _Done()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor itself, in a list."""
        return [tensor]

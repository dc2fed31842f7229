"""Ranks as threads of one process, with queues in the place of a network; a wait that nobody answers is an error."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh, split_axes
from monai_memeff.halo.run.ranks.comm.transport import Counters, Message, PeerLostError

PATIENCE = 60.0


class Mail:
    """Mailboxes of a group, and whether one of its ranks failed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.boxes: dict[tuple[int, int, str], queue.Queue[torch.Tensor]] = {
            (a, b, kind): queue.Queue() for a in range(size) for b in range(size) for kind in ("rows", "all")
        }
        self.failed = threading.Event()

    def take(self, sender: int, receiver: int, kind: str) -> torch.Tensor:
        """Wait for a message."""
        for _ in range(int(PATIENCE / 0.05)):
            if self.failed.is_set():
                raise PeerLostError(f"Rank {sender} failed.")
            try:
                return self.boxes[sender, receiver, kind].get(timeout=0.05)
            except queue.Empty:
                continue
        raise PeerLostError(f"Rank {receiver} waits for {kind} of rank {sender} that nobody sends.")


class _Arriving:
    def __init__(self, mail: Mail, rank: int, receives: Sequence[Message]) -> None:
        self._mail, self._rank, self._receives = mail, rank, receives

    def wait(self) -> list[torch.Tensor]:
        for peer, buffer in self._receives:
            message = self._mail.take(peer, self._rank, "rows")
            assert (message.shape.numel(), message.dtype) == (buffer.shape.numel(), buffer.dtype)
            buffer.view(-1).copy_(message.view(-1))
        return [b for _, b in self._receives]


class ThreadCommunicator(Counters):
    """One rank's end of the mail."""

    def __init__(self, mail: Mail, rank: int) -> None:
        super().__init__(rank, mail.size)
        self._mail = mail

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Arriving:
        """Deliver at once; wait later."""
        self.count(sends)
        assert all(t.is_contiguous() and peer != self.rank for peer, t in [*sends, *receives])
        for peer, tensor in sends:
            self._mail.boxes[self.rank, peer, "rows"].put(tensor.clone())
        return _Arriving(self._mail, self.rank, receives)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensor."""
        self.reductions += 1
        for peer in range(self.size):
            self._mail.boxes[self.rank, peer, "all"].put(tensor.clone())
        found = [self._mail.take(peer, self.rank, "all") for peer in range(self.size)]
        assert all((t.shape, t.dtype) == (tensor.shape, tensor.dtype) for t in found)
        return found

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum, in place."""
        return tensor.copy_(torch.stack(self.all_gather(tensor)).sum(0))


def run_ranks(
    work: Callable[[HaloMesh], Any], spatial: Sequence[int] = (2,), axes: Sequence[int] | None = None
) -> list[Any]:
    """What `work(mesh)` returns on every rank of a mesh, by rank; the first error of any rank is raised."""
    mail, size = Mail(math.prod(spatial)), math.prod(spatial)
    results: list[Any] = [None] * size
    errors: list[tuple[bool, int, BaseException]] = []
    grad, dtype = torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")
    low = torch.is_autocast_enabled("cpu")

    def body(rank: int) -> None:
        mesh = HaloMesh(tuple(spatial), split_axes(spatial, axes), ThreadCommunicator(mail, rank))
        try:
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=low):
                results[rank] = work(mesh)
        except BaseException as error:
            errors.append((isinstance(error, PeerLostError), rank, error))
            mail.failed.set()

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda e: e[:2])[2]
    assert all(box.empty() for box in mail.boxes.values()), "messages were sent that nobody wanted"
    return results

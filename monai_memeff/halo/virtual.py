"""Virtual ranks: threads of one process that take turns (a baton), with mailboxes in place of a network."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from monai_memeff.halo.transport import Counters, Message, Pending
from monai_memeff.memory.stream import same_stream

_HERE = threading.local()


class Hub:
    """Runs one function as several ranks in turn; exactly one rank is awake at any time.

    Args:
        size: number of virtual ranks.
        on_switch: called by a rank with its number just before it hands the baton on (a pager evicts here).
    """

    def __init__(self, size: int, on_switch: Callable[[int], None] | None = None) -> None:
        self.size = size
        self._on_switch = on_switch
        self._lock = threading.Condition()
        self._ready: list[Callable[[], bool] | None] = [lambda: True] * size
        self._current = -1
        self._step = 1
        self.failure: BaseException | None = None
        self.mail: dict[tuple[int, int], deque[torch.Tensor]] = {}
        self.rounds: dict[int, list[Any]] = {}

    def wait(self, rank: int, ready: Callable[[], bool]) -> None:
        """Hand the baton on until `ready()` holds; raises if another rank failed or nobody can go on."""
        if self.failure is None and ready():
            return
        if self._on_switch is not None:
            self._on_switch(rank)
        with self._lock:
            self._ready[rank] = ready
            self._pass_on(rank)
            self._sleep(rank)
        if self.failure is not None:
            raise RuntimeError("Another virtual rank failed.") from self.failure

    def _sleep(self, rank: int) -> None:
        while self._current != rank and self.failure is None:
            self._lock.wait()

    def _pass_on(self, rank: int) -> None:
        """Wake the next rank that can run, sweeping to and fro so that neighbours follow each other."""
        order = self._sweep(rank)
        for other in order:
            ready = self._ready[other]
            if ready is not None and ready():
                self._current = other
                self._lock.notify_all()
                return
        if any(r is not None for r in self._ready):
            self.failure = self.failure or RuntimeError("Deadlock: every virtual rank waits for another one.")
        self._lock.notify_all()

    def _sweep(self, rank: int) -> list[int]:
        up, down = list(range(rank + 1, self.size)), list(range(rank - 1, -1, -1))
        first, second = (up, down[::-1]) if self._step > 0 else (down, up[::-1])
        if not first:
            self._step = -self._step
            first, second = second[::-1], []
        return [*first, *second, rank]

    def _body(self, rank: int, work: Callable[[int], Any], results: list[Any], modes: Sequence[Any]) -> None:
        try:
            with self._lock:
                self._sleep(rank)
            if self.failure is None:
                _HERE.rank = rank
                with contextlib.ExitStack() as stack:
                    for mode in modes:
                        stack.enter_context(mode())
                    results[rank] = work(rank)
        except BaseException as error:
            self.failure = self.failure or error
        with self._lock:
            self._ready[rank] = None
            self._pass_on(rank)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Call `work(rank)` for every rank, each in its own thread with the caller's modes; results by rank.

        Grad mode, autocast, dispatch modes (a peak meter counts the ranks' tensors), CUDA device and stream are those
        of the caller. A backward pass stays in its rank's thread on a GPU too: torch's one thread per GPU could not
        serve a rank that another one waits for.
        """
        results: list[Any] = [None] * self.size
        modes = (same_stream(), _one_thread, _grad_mode(), _autocast(), *_dispatch_modes())
        threads = [
            threading.Thread(target=self._body, args=(r, work, results, modes), daemon=True) for r in range(self.size)
        ]
        with self._lock:
            self._current = 0
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return results


class VirtualCommunicator(Counters):
    """One of several ranks in one process; a thread of `Hub`."""

    def __init__(self, hub: Hub, rank: int) -> None:
        super().__init__(rank, hub.size)
        self._hub = hub
        self._round = 0

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Post tensors into the receivers' mailboxes; `wait` hands the baton on until the answers are there."""
        self.count(sends)
        for peer, tensor in sends:
            self._hub.mail.setdefault((self.rank, peer), deque()).append(tensor)
        return _Mail(self._hub, self.rank, [peer for peer, _ in receives])

    def _rendezvous(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        number, self._round = self._round, self._round + 1
        slots = self._hub.rounds.setdefault(number, [None] * (self.size + 1))
        slots[self.rank] = tensor
        slots[-1] = (slots[-1] or 0) + 1
        self._hub.wait(self.rank, lambda: slots[-1] >= self.size)
        result = list(slots[:-1])
        slots[-1] += 1
        if slots[-1] == 2 * self.size:
            del self._hub.rounds[number]
        return result

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, added in rank order."""
        self.reductions += 1
        return torch.stack(self._rendezvous(tensor)).sum(0)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of all ranks, by rank."""
        return self._rendezvous(tensor)


class _Mail:
    def __init__(self, hub: Hub, rank: int, peers: list[int]) -> None:
        self._hub, self._rank, self._peers = hub, rank, peers

    def wait(self) -> list[torch.Tensor]:
        boxes = [self._hub.mail.setdefault((peer, self._rank), deque()) for peer in self._peers]
        need = {peer: self._peers.count(peer) for peer in self._peers}
        self._hub.wait(self._rank, lambda: all(len(self._hub.mail[p, self._rank]) >= n for p, n in need.items()))
        return [box.popleft() for box in boxes]


def _one_thread() -> Any:
    return torch.autograd.set_multithreading_enabled(False)


def _grad_mode() -> Callable[[], Any]:
    if torch.is_inference_mode_enabled():
        return torch.inference_mode
    return torch.enable_grad if torch.is_grad_enabled() else torch.no_grad


def _autocast() -> Callable[[], Any]:
    device = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


def _dispatch_modes() -> list[Callable[[], Any]]:
    """The caller's dispatch modes, outermost first; torch keeps them per thread."""
    return [partial(_same, mode) for mode in _get_current_dispatch_mode_stack()]


def _same(mode: Any) -> Any:
    return mode


def here() -> int | None:
    """Number of the virtual rank that runs in this thread, or None outside `Hub.run`."""
    return getattr(_HERE, "rank", None)

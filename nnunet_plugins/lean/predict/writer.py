"""Complete rows of logits on their way from the accumulators to the disk, beside the prediction."""

from __future__ import annotations

from collections.abc import Callable
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

INFINITE = (
    "Encountered inf in predicted array. Aborting... If this problem persists, reduce value_scaling_factor in "
    "compute_gaussian or increase the dtype of predicted_logits to fp32"
)


INFINITE_BITS = 0x7C00
"""Of half precision, without the sign."""


def has_infinite(planes: Tensor) -> bool:
    """Whether one of the half-precision values on the host is infinite: by their bits, in the caller's thread alone.

    Torch would wake its threads, and those of the prediction beside it would wait for the same cores.
    """
    bits = planes.numpy().view(np.uint16)
    return bool(((bits & 0x7FFF) == INFINITE_BITS).any())


class RowWriter:
    """A thread that copies planes to the host, checks them as nnU-Net does, cuts the padding off and hands them on.

    Args:
        inside: The image within the padded one, a slice per spatial axis.
        sink: Gets (row, first class, planes (classes, Y, Z)).
        device: Where the planes are; from a GPU they are copied on a stream of its own, beside the next tiles.
    """

    def __init__(
        self, inside: tuple[slice, ...], sink: Callable[[int, int, Tensor], None], device: torch.device
    ) -> None:
        self.inside, self.sink = inside, sink
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # need not be the current GPU's
        self.error: BaseException | None = None
        self.queue: Queue[Any] = Queue(maxsize=2)
        self.thread = Thread(target=self._run, daemon=True)
        self.thread.start()

    def put(self, row: int, first_class: int, planes: Tensor) -> None:
        """Take complete planes (classes, Y, Z) of a row, padding included; they must not change afterwards."""
        if self.error is not None:
            raise self.error
        ready = torch.cuda.Event() if planes.device.type == "cuda" else None
        if ready is not None:
            ready.record(torch.cuda.current_stream(planes.device))
        self.queue.put((row, first_class, planes, ready))

    def finish(self) -> None:
        """Wait until everything is handed on.

        Raises:
            RuntimeError: nnU-Net's own, for infinite logits; or whatever the sink raised.
        """
        self.stop()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the thread after what it was given."""
        self.queue.put(None)
        self.thread.join()

    def _run(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.error is None:
                try:
                    with torch.inference_mode():
                        self._hand_on(*item)
                except BaseException as error:  # raised again where the prediction runs
                    self.error = error

    def _hand_on(self, row: int, first_class: int, planes: Tensor, ready: Any) -> None:
        planes = self._on_host(planes, ready)
        if has_infinite(planes):
            raise RuntimeError(INFINITE)
        rows, height, width = self.inside
        if rows.start <= row < rows.stop:
            self.sink(row - rows.start, first_class, planes[:, height, width])

    def _on_host(self, planes: Tensor, ready: Any) -> Tensor:
        if ready is None or self.stream is None:
            return planes
        host = torch.empty(planes.shape, dtype=planes.dtype, pin_memory=True)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            host.copy_(planes, non_blocking=True)
        self.stream.synchronize()
        return host

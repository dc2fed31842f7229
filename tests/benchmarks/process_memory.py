"""How far the resident set of this process rises during a call (Linux)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path


def peak_resident_bytes(step: Callable[[], object]) -> int:
    """Run ``step`` and return the peak of the resident set minus its level before.

    Freed memory is handed back to the system and the peak counter of the process is reset first, so what was needed
    before the call does not hide what the call needs.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}; this measurement needs Linux.")


class Resident:
    """Samples the resident set of this process: anonymous bytes, and all of it, above their level at entry."""

    def __enter__(self) -> Resident:
        self._level, self.peak, self._over = self._now(), [0, 0], threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _now(self) -> list[int]:
        return [_status("RssAnon"), _status("VmRSS")]

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.peak = [max(p, n - lv) for p, n, lv in zip(self.peak, self._now(), self._level, strict=True)]

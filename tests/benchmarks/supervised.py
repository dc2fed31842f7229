"""Sections of a long script in a process of their own, which may crash or hang: the ones after it run all the same."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

BEGINS = "# begins "
"""A line of the process: this and the name of the section."""

POISONED = 3
"""Exit status of a process that can go on with no section, as after an error of the device, and has said so."""

START = 60.0
"""Seconds for a process to begin its first section."""

DEATH_SIGNAL = 1
"""Of prctl, PR_SET_PDEATHSIG: the signal that a process gets when its parent ends."""


def _end_with_parent() -> None:
    """Let Linux kill this process when its parent ends: one that is killed stops none of those it started."""
    _libc.prctl(DEATH_SIGNAL, signal.SIGKILL)


if sys.platform == "linux":
    _libc = ctypes.CDLL(None)
    WITH_PARENT: Callable[[], None] | None = _end_with_parent
else:
    WITH_PARENT = None

Report = Callable[[str, str], None]


def supervise(
    command: Callable[[list[str], float], list[str]], limits: Mapping[str, float], seconds: float, report: Report
) -> int:
    """Run the sections in order, in a new process after every one that ended its process.

    Args:
        command: Command line for a list of sections and the seconds that are left; it runs them in order and prints
            ``# begins NAME`` before each. It exits with 0, with 1 after failures of its own sections, or with 3.
        limits: Section -> seconds after which its process is stopped.
        seconds: Seconds for everything.
        report: Called with a section and what became of its process, unless that exits by itself.

    Returns:
        The number of processes that failed.
    """
    left, end, failed = list(limits), time.monotonic() + seconds, 0
    while left and time.monotonic() < end:
        child = _Child(command(left, end - time.monotonic()))
        reason = child.follow(limits, end)
        failed += child.status != 0
        begun = child.section
        if reason is not None:
            report(begun or left[0], reason)
        if reason is None and child.status != POISONED:
            return failed
        left = left[left.index(begun) + 1 :] if begun in left else left[1:]
    for name in left:
        report(name, "no time was left")
    return failed


class _Child:
    """One process, its lines as they come, and the section it is in."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True, preexec_fn=WITH_PARENT
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.section: str | None = None
        self.status = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def follow(self, limits: Mapping[str, float], end: float) -> str | None:
        """Show its lines until it ends; why it was stopped or what ended it, None where it exits by itself."""
        limit = min(end, time.monotonic() + START)
        while True:
            try:
                line = self.lines.get(timeout=max(limit - time.monotonic(), 0.01))
            except queue.Empty:
                self._stop()
                return "stopped: its time was over"
            if line is None:
                self.status = self.process.wait()
                return None if self.status in (0, 1, POISONED) else f"its process ended with status {self.status}"
            if line.startswith(BEGINS):
                self.section = line.removeprefix(BEGINS)
                limit = min(end, time.monotonic() + limits[self.section])
            else:
                print(line, flush=True)

    def _stop(self) -> None:
        """End the process and those that it has started."""
        self.status = -signal.SIGKILL
        if sys.platform == "win32":
            self.process.kill()
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

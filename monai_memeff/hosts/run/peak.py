"""Peak memory of one study: of the process by the system's own account, and of the GPU by torch's allocator."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from monai_memeff.memory import measure_peak

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def peaks(device: torch.device) -> Iterator[dict[str, int | None]]:
    """A dictionary that is filled when the block ends.

    ``process``: highest resident bytes since the block began (where the system cannot forget older peaks: since the
    process began); ``device``: highest bytes of tensors on a GPU above those at the beginning; None where not known.
    """
    found: dict[str, int | None] = {"process": None, "device": None}
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # Linux: the highest level begins anew
    with contextlib.nullcontext() if device.type == "cpu" else measure_peak(device) as meter:
        yield found
    found["process"] = _highest()
    found["device"] = meter.peak_bytes if meter is not None else None


def _highest() -> int | None:
    with contextlib.suppress(OSError):
        level = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        if level:
            return 1024 * int(level[1])
    try:
        import resource
        import sys
    except ImportError:
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)

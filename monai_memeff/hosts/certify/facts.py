"""What a validation file must say about a run: machine, device, versions and hashes."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from monai_memeff.hosts.run.output.results import versions

SHOWN = ("monai-memeff", "torch", "monai", "numpy", "nnunetv2", "python")


def software() -> dict[str, str]:
    """Names and versions, also where the package runs from its source."""
    found = {"monai-memeff": str(vars(sys.modules["monai_memeff"])["__version__"]), **versions()}
    found["torch"] = torch.__version__  # with the build that the distribution's number leaves out
    return {name: found[name] for name in SHOWN if name in found}


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the device in words."""
    found: dict[str, Any] = {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()}
    found["threads"] = torch.get_num_threads()
    memory = _memory()
    found |= {} if memory is None else {"memory_bytes": memory}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        found["device"] = "CPU" if device.type == "cpu" else str(device)
    return found


def now() -> str:
    """The time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None

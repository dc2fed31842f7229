"""The overlay file that runs a bundle within a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monai_memeff.data import atomic_write
from monai_memeff.errors import InputError
from monai_memeff.memory import NetworkEstimate
from monai_memeff.overlays import overlay_path

WHOLE = {"inferer": {"_target_": "SimpleInferer"}, "evaluator#inferer": "@inferer"}
"""The network on the whole volume at once."""

FILES = {
    ("halo", False): "halo_inference",
    ("sparse", False): "sparse_unet_inference",
    ("sparse", True): "sparse_unet",
    ("occupancy", False): "occupancy_inference",
    ("occupancy", True): "occupancy",
    ("clstm", False): "clstm_inference",
    ("clstm", True): "clstm",
}
"""System and whether it trains -> the installed overlay that the setting goes into."""


def overlay_for(found: NetworkEstimate) -> dict[str, Any] | None:
    """The overlay of an estimate; None where a bundle needs none."""
    if found.system == "dense":
        return None if found.training else dict(WHOLE)
    content: dict[str, Any] = json.loads(overlay_path(FILES[found.system, found.training]).read_text(encoding="utf-8"))
    if not found.training:
        content["inferer"] = {**content["inferer"], **found.setting}
    return content


def write_overlay(found: NetworkEstimate, target: Path, *sources: Path) -> Path | None:
    """Write the overlay of an estimate; None where a bundle needs none.

    Args:
        found: The estimate of the system that was chosen.
        target: a .json file.
        sources: files that it must not replace.

    Raises:
        InputError: the name does not end in .json, or it is a file of somebody else.
    """
    content = overlay_for(found)
    if content is None:
        return None
    if target.suffix != ".json":
        raise InputError(f"an overlay is a .json file, got {target.name!r}: give --output such a name")
    if target.exists() and "bundle_root" in target.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{target} is a bundle's own configuration: give --output another name")
    with atomic_write(target, *sources) as work:
        work.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return target

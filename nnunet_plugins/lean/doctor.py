"""What the doctor says of lean prediction: whether it is on, and that it gives stock's labels on this machine."""

from __future__ import annotations

import os
import sys

from nnunet_plugins.environment import SWITCH, why_not_run

LEAN = "lean"


def lean_report(always: bool = False) -> tuple[str, list[str]]:
    """Say whether lean prediction is on, with a proof when it is.

    Args:
        always: Prove it when it is off, too.

    Returns:
        A line, and problems.
    """
    value = os.environ.get(SWITCH, "").strip().lower()
    on = value not in ("", "0", "off")
    if on and value != LEAN:
        return "off", [f"{SWITCH} must be lean or off, got {value!r}; whole is not available in this version"]
    if on and not any(type(finder).__name__ == "SwitchFinder" for finder in sys.meta_path):
        return "off", [f"{SWITCH}=lean has no effect: {why_not_run()}; `python -m nnunet_plugins predict` needs none"]
    if not on and not always:
        return f"off; export {SWITCH}=lean turns it on", []
    return _proof("on" if on else "off here, possible")


def _proof(state: str) -> tuple[str, list[str]]:
    from nnunet_plugins.lean import fingerprint, switch

    reason = switch.refusal()
    if reason is not None:
        return "off", [f"lean prediction is not possible: {reason} ({', '.join(fingerprint.KNOWN)} are known)"]
    from nnunet_plugins.lean.proof import differing_voxels

    differing, total = differing_voxels()
    line = f"{state}; {differing} of {total} voxels of a trial model differ from stock"
    return line, [f"{differing} voxels differ from stock: unset {SWITCH}, and report this"] if differing else []

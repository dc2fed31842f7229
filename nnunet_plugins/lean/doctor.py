"""What the doctor says of lean and whole-volume prediction: whether one is on, and a proof on this machine."""

from __future__ import annotations

import os
import sys

from nnunet_plugins.environment import SWITCH, why_not_run

LEAN, WHOLE = "lean", "whole"


def lean_report(always: bool = False) -> tuple[str, list[str]]:
    """Say whether lean prediction is on, with a proof when it is.

    Args:
        always: Prove it when it is off, too.

    Returns:
        A line, and problems.
    """
    value = os.environ.get(SWITCH, "").strip().lower()
    on = value not in ("", "0", "off")
    if on and value not in (LEAN, WHOLE):
        return "off", [f"{SWITCH} must be lean, whole or off, got {value!r}"]
    if on and not any(type(finder).__name__ == "SwitchFinder" for finder in sys.meta_path):
        return "off", [
            f"{SWITCH}={value} has no effect: {why_not_run()}; `python -m nnunet_plugins predict` needs none"
        ]
    if not on and not always:
        return f"off; export {SWITCH}=lean turns it on", []
    return _proof("on" if on else "off here, possible", value == WHOLE)


def _proof(state: str, whole: bool) -> tuple[str, list[str]]:
    from nnunet_plugins.lean import fingerprint, switch

    reason = switch.refusal()
    if reason is not None:
        return "off", [f"lean prediction is not possible: {reason} ({', '.join(fingerprint.KNOWN)} are known)"]
    from nnunet_plugins.lean.proof import differing_voxels

    differing, total = differing_voxels()
    oracle = "the network on the whole image" if whole else "stock"
    kind = "whole volumes, " if whole else ""
    line = f"{kind}{state}; {differing} of {total} voxels of a trial model differ from {oracle}"
    return line, [f"{differing} voxels differ from {oracle}: unset {SWITCH}, and report this"] if differing else []

"""Runs when Python starts: tells nnU-Net where monai-memeff keeps its trainers (docs/howto/nnunet.md says why)."""

from __future__ import annotations

import os
import sys

VARIABLE = "nnUNet_extTrainer"  # nnU-Net >= 2.8 looks for trainers in the folders listed here
OPT_OUT = "MEMEFF_NO_NNUNET"  # set to anything but 0: nothing is touched


def ext_folder() -> str | None:
    """Return the folder of the shim, found without importing the package; None when the package is not installed."""
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec("nnunet_plugins", None) if find_spec else None
        if spec is not None:
            folders = [os.path.join(place, "_ext") for place in spec.submodule_search_locations or ()]
            return next((os.path.abspath(folder) for folder in folders if os.path.isdir(folder)), None)
    return None


def with_folder(value: str | None, folder: str) -> str:
    """Return the variable's value with the folder at its end, once; what the user listed stays first."""
    listed = [entry for entry in (value or "").split(os.pathsep) if entry.strip()]
    if any(os.path.realpath(entry) == os.path.realpath(folder) for entry in listed):
        return value or ""
    return os.pathsep.join([*listed, folder])


def register() -> None:
    """Append the shim's folder to the variable; imports no package and never raises, whatever the environment."""
    try:
        if os.environ.get(OPT_OUT, "0") in ("", "0"):
            folder = ext_folder()
            if folder is not None:
                os.environ[VARIABLE] = with_folder(os.environ.get(VARIABLE), folder)
    except Exception:  # a start-up hook must never stop Python
        return

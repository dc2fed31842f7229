"""Runs when Python starts: tells nnU-Net of monai-memeff's trainers and switches (docs/howto/nnunet.md says why)."""

from __future__ import annotations

import os
import sys

VARIABLE = "nnUNet_extTrainer"  # nnU-Net >= 2.8 looks for trainers in the folders listed here
OPT_OUT = "MEMEFF_NO_NNUNET"  # set to anything but 0: nothing is touched
SWITCH = "MEMEFF_NNUNET"  # lean: stock models in less memory; whole: without tiles; unset, empty, 0 or off: as ever
SWITCHED = (
    "nnunetv2.inference.export_prediction",
    "nnunetv2.inference.predict_from_raw_data",
    "totalsegmentator.nnunet_runtime_patches",
)


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


class SwitchFinder:
    """Watches for modules of nnU-Net and TotalSegmentator, and has them switched right after they are imported."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """Return the module's own spec with a loader that switches it afterwards; None when the switch is off."""
        if name not in SWITCHED or not is_set():
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find and finder is not self else None
            if spec is not None and spec.loader is not None:
                return _switched(spec, name)
        return None


def _switched(spec, name):  # type: ignore[no-untyped-def]
    """Let the module's loader switch it when it has run it."""
    execute = spec.loader.exec_module

    def exec_module(module) -> None:  # type: ignore[no-untyped-def]
        execute(module)
        from nnunet_plugins.lean import switch

        switch.on_import(name)

    spec.loader.exec_module = exec_module
    return spec


def is_set() -> bool:
    """Return whether the switch is set now; a program may set it before it imports nnU-Net."""
    return os.environ.get(SWITCH, "").strip().lower() not in ("", "0", "off")


def watch() -> None:
    """Watch for nnU-Net's modules, once."""
    if not any(type(finder).__name__ == "SwitchFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, SwitchFinder())


def register() -> None:
    """Append the shim's folder to the variable; imports no package and never raises, whatever the environment."""
    try:
        if os.environ.get(OPT_OUT, "0") in ("", "0"):
            folder = ext_folder()
            if folder is not None:
                os.environ[VARIABLE] = with_folder(os.environ.get(VARIABLE), folder)
            watch()
    except Exception:  # a start-up hook must never stop Python
        return

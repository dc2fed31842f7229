"""Where nnU-Net looks for trainers: the variable, our entry in it, and why the entry may be missing."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

# the start-up file must stand alone, so it says these names for itself; a test holds both to the same behavior
VARIABLE = "nnUNet_extTrainer"
OPT_OUT = "MEMEFF_NO_NNUNET"
SWITCH = "MEMEFF_NNUNET"
STARTUP = "_monai_memeff_nnunet"


def ext_folder() -> str:
    """Return the folder of the shim that nnU-Net searches, beside this file."""
    return str(Path(__file__).resolve().parent / "_ext")


def listed_folders() -> list[str]:
    """Return the folders of the variable as nnU-Net reads it, empty entries left out."""
    return [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry.strip()]


def is_listed() -> bool:
    """Return whether the variable of this process names our folder."""
    return any(os.path.realpath(entry) == os.path.realpath(ext_folder()) for entry in listed_folders())


def export_line(windows: bool = os.name == "nt") -> str:
    """Return the shell line that names our folder after whatever the variable holds now (`set` on Windows)."""
    value = os.environ[VARIABLE] if is_listed() else os.pathsep.join([*listed_folders(), ext_folder()])
    return f'set "{VARIABLE}={value}"' if windows else f"export {VARIABLE}={shlex.quote(value)}"


def why_not_listed() -> str:
    """Say in one sentence why the start-up file did not name our folder in this process, or who took it out."""
    if startup_ran() and os.environ.get(OPT_OUT, "0") in ("", "0"):
        return "the start-up file added it, but this process, or who started it, set the variable anew afterwards"
    return why_not_run()


def startup_ran() -> bool:
    """Whether Python ran the start-up file when this process started."""
    return STARTUP in sys.modules


def why_not_run() -> str:
    """Say in one sentence why the start-up file did nothing in this process."""
    if os.environ.get(OPT_OUT, "0") not in ("", "0"):
        return f"{OPT_OUT} is set, which switches the start-up file off: unset it"
    if sys.flags.no_site:
        return "Python runs with -S, so it skips start-up files"
    module = find_spec(STARTUP)
    if module is None or module.origin is None:
        return "the start-up file is not installed (this is a source tree on the path, not a pip install)"
    if not Path(module.origin).with_name("monai_memeff_nnunet.pth").is_file():
        return f"monai_memeff_nnunet.pth is missing beside {module.origin}: reinstall monai-memeff"
    if startup_ran():
        return "the variable was set after Python had started"
    return (
        f"{Path(module.origin).parent} is not a site-packages folder of this Python, which runs no start-up files there"
    )

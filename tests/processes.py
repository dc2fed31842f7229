"""New processes that have the libraries loaded: a server imports torch, MONAI and nnU-Net once and forks for each run.

Loading them takes five to eight seconds of a core, which dozens of tests would pay. The server loads nothing of this
package, and nnU-Net's modules, which read the environment when they are imported, are imported anew in every run.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

LIBRARIES = ["torch", "monai.bundle", "monai.engines", "monai.handlers", "monai.inferers", "monai.losses", "nibabel"]
LIBRARIES += ["scipy.ndimage", "skimage.measure", "torch._dynamo", "nnunetv2.run.run_training"]
LIBRARIES += [
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
]
SECONDS = 1200


def run_module(
    module: str, *arguments: str, folder: Path, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """What ``python -m module arguments`` printed, and its exit status.

    Args:
        module: its name.
        *arguments: its command line.
        folder: the working directory.
        variables: the whole environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as scratch:
        printed = [os.path.join(scratch, name) for name in ("out", "err")]
        start = (module, list(arguments), str(folder), dict(variables), printed)
        process = context.Process(target=_child, args=start)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        texts = [Path(path).read_text("utf-8", "replace") if os.path.exists(path) else "" for path in printed]
    return subprocess.CompletedProcess([module, *arguments], process.exitcode or 0, *texts)


def _child(module: str, arguments: list[str], folder: str, variables: dict[str, str], printed: list[str]) -> None:
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for name in [name for name in sys.modules if name.partition(".")[0] == "nnunetv2"]:
        del sys.modules[name]
    multiprocessing.set_start_method(None, force=True)  # for processes of its own: Python's default, not this server
    sys.argv = [module, *arguments]
    sys.path.insert(0, folder)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        coverage = sys.modules.get("coverage")
        measured = coverage.Coverage.current() if coverage else None
        if measured is not None:  # a forked process ends without what writes the measurement down
            measured.save()

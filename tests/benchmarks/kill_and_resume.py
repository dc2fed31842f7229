"""Kill `memeff run` at random moments and run it again, many rounds: what is there is always whole.

python tests/benchmarks/kill_and_resume.py --rounds 100
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from monai_memeff.hosts.run import run_studies
from tests.hosts.bundles import image, small_bundle

STUDIES = 6


def killed_after(seconds: float, bundle: Path, inputs: Path, output: Path) -> bool:
    """Start in a process of its own, and kill it; False where it had ended before."""
    child = os.fork()
    if child == 0:
        for handle in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
        run_studies(bundle, [inputs], output)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main() -> None:
    """Count rounds, kills and the studies that had to be done again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    work = Path(tempfile.mkdtemp())
    bundle, inputs = small_bundle(work / "bundle"), work / "in"
    inputs.mkdir()
    for number in range(STUDIES):
        nibabel.save(nibabel.Nifti1Image(image((16, 16, 9), number), np.eye(4)), inputs / f"{number}.nii")
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        assert run_studies(bundle, [inputs], work / "whole") == 0
        took = time.perf_counter() - began
    kills = wrong = 0
    for _ in range(options.rounds):
        output = work / "out"
        shutil.rmtree(output, ignore_errors=True)
        kills += killed_after(draw.uniform(0, took), bundle, inputs, output)
        for folder in output.glob("[0-9]"):
            wrong += {file.name for file in folder.iterdir()} != {"report.json", "segmentation.nii.gz"}
        with contextlib.redirect_stdout(io.StringIO()):
            wrong += run_studies(bundle, [inputs], output) != 0
        for number in range(STUDIES):
            file = Path(str(number), "segmentation.nii.gz")
            wrong += (
                not (output / file).is_file() or (output / file).read_bytes() != (work / "whole" / file).read_bytes()
            )
        wrong += sorted(entry.name for entry in output.iterdir()) != [str(number) for number in range(STUDIES)]
    shutil.rmtree(work)
    print(f"{options.rounds} rounds, {kills} killed, {wrong} wrong")


if __name__ == "__main__":
    main()

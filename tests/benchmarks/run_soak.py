"""Many volumes through `memeff run` in one process: the memory at the end against that after the third.

python tests/benchmarks/run_soak.py --volumes 50
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import nibabel
import numpy as np

from monai_memeff.hosts.run.source.bundle import Bundle
from monai_memeff.hosts.run.source.checkpoints import checkpoints_of
from monai_memeff.hosts.run.studies import find_studies
from monai_memeff.hosts.run.worker import Settings, Worker
from tests.hosts.bundles import image, small_bundle

PAGE = 4096


def resident() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main() -> None:
    """Print what the process holds after the third volume and after the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=50)
    parser.add_argument("--overlays", nargs="*", default=["halo"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        bundle, inputs = small_bundle(work / "bundle"), work / "in"
        inputs.mkdir()
        for number in range(options.volumes):
            shape = (48 + number % 5, 44, 40 + number % 3)
            nibabel.save(nibabel.Nifti1Image(image(shape, number), np.eye(4)), inputs / f"{number:03}.nii")
        opened = Bundle(bundle, options.overlays)
        weights = {str(found.file): found.sha256() for found in checkpoints_of(opened)}
        settings = Settings(bundle, tuple(options.overlays), work / "out", "nifti", None, False, weights, opened.digest)
        worker, held = Worker(settings), []
        for study in find_studies([inputs], opened.image_names()):
            with contextlib.redirect_stdout(io.StringIO()):
                outcome = worker(study)
            assert outcome.done, outcome.line
            held.append(resident())
    change = 100 * (held[-1] / held[2] - 1)
    print(f"{len(held)} volumes: {held[2] / 2**20:.1f} MiB after the third, {held[-1] / 2**20:.1f} MiB at the end")
    print(f"{change:+.2f} %, largest {max(held[2:]) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

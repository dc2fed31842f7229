"""How much memory and time `nnUNetv2_predict` needs for a whole 512 x 512 x Z head with SparseTrainer's network.

The model is trained for three iterations on a small generated dataset of two modalities: what it predicts means
nothing, what it costs does. The head is given as both modalities.

    python tests/benchmarks/nnunet_predict_head.py --device cpu --patch 128
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nibabel

from tests.nnunet_plugins.host import Host, labels_of, write_dataset

NAME = "Dataset903_Head"


def main() -> None:
    """Train, predict, and print one line."""
    options = arguments()
    if not options.image.is_file():
        raise SystemExit(f"no image at {options.image}: set MEMEFF_DATA, or name one with --image.")
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder) / "nnunet")
        trainers = host.folder / "own_trainers" / "short_trainers.py"
        changed = f"class WholeHeadTrainer(ShortSparseTrainer):\n    patch_size = ({options.patch},) * 3\n"
        trainers.write_text(trainers.read_text() + changed + "    max_active = SparseTrainer.max_active\n")
        host.prepare(write_dataset(host.raw, NAME, 2, (64, 64, 64)), 903)
        host.split(NAME, ["c_000"], ["c_001"])
        host.run("nnUNetv2_train", 903, "3d_fullres", 0, "-tr", "WholeHeadTrainer", "-device", options.device)
        print(predict(host, options))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    head = Path(os.environ.get("MEMEFF_DATA", beside)) / "head_ct" / "vhf_head_ct.nii.gz"
    parser.add_argument("--image", type=Path, default=head)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--patch", type=int, default=128, help="extent of the cubic patch, in voxels")
    return parser.parse_args()


def predict(host: Host, options: argparse.Namespace) -> str:
    """Predict the head with nnU-Net's command; returns shape, peak resident memory and time."""
    images, out = host.folder / "head", host.folder / "out"
    images.mkdir()
    for channel in range(2):
        shutil.copy(options.image, images / f"head_{channel:04}.nii.gz")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    start = time.monotonic()
    words = ["-i", images, "-o", out, "-d", 903, "-c", "3d_fullres", "-f", 0, "-tr", "WholeHeadTrainer"]
    words += ["-device", options.device, "-npp", 0, "-nps", 0, "--disable_tta"]
    host.run("nnUNetv2_predict", *words, OMP_NUM_THREADS=str(os.cpu_count()))
    minutes = (time.monotonic() - start) / 60
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    shape = nibabel.load(options.image).shape
    (predicted,) = labels_of(out).values()
    assert predicted.shape == shape
    note = "" if peak * 2**20 > before else " (or less: training needed more)"
    return f"{shape}, patch {options.patch}^3 on {options.device}: {peak:.1f} GiB resident{note}, {minutes:.1f} minutes"


if __name__ == "__main__":
    main()

"""A whole head CT of 512 x 512 x 234 through SlabInferer, from file to file: seconds and resident memory."""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import torch

from monai_memeff.clstm import CLSTMUNet, NiftiSlabs, SlabInferer

ROOT = Path(__file__).resolve().parents[2]


def resident() -> float:
    """Highest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Infer, then time a few slices of the published network."""
    parser = argparse.ArgumentParser(description=__doc__)
    data = Path(os.environ.get("MEMEFF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--image", type=Path, default=data / "head_ct" / "vhf_head_ct.nii.gz")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--slab", type=int, default=8)
    parser.add_argument("--slices", type=int, default=2, help="of the published network, to time; 0: none")
    parser.add_argument("--progress", action="store_true")
    choice = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"after imports: {resident():.0f} MiB resident")
    net = CLSTMUNet(channels=choice.channels).eval()
    slabs = NiftiSlabs(choice.image, choice.slab, transform=lambda slab: (slab + 650) / 550)
    with tempfile.TemporaryDirectory() as folder:
        out = slabs.create_labels(Path(folder) / "labels.nii")
        wall, processor = time.perf_counter(), time.process_time()
        SlabInferer(labels=True, progress=choice.progress).write(slabs, net, out)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(
        f"{slabs.shape}, channels {choice.channels}, slabs of {choice.slab}: {processor:.0f} CPU-seconds, "
        f"{wall:.0f} s on the wall, {resident():.0f} MiB resident (random weights)",
        flush=True,
    )
    if choice.slices:
        net = CLSTMUNet().eval()
        volume = torch.rand(1, 1, *slabs.shape[:2], choice.slices)
        began = time.process_time()
        with torch.no_grad():
            net(volume)
        each = (time.process_time() - began) / choice.slices
        print(
            f"published channels: {each:.1f} s per slice over {choice.slices} slices, {resident():.0f} MiB resident; "
            f"times {slabs.shape[2]} slices: {each * slabs.shape[2] / 60:.0f} minutes (extrapolated)"
        )


if __name__ == "__main__":
    main()

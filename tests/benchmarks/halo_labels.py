"""Streams labels of many classes without a float buffer for all of them: 104 classes at 512^3 on one core.

    python tests/benchmarks/halo_labels.py --store /scratch/halo [--side 512] [--classes 104] [--partitions 32]

The network is a MONAI BasicUNet, two channels wide, with random weights: it is the output that is large. Printed are
the bytes that the logits of the whole would take, the device peak (activations), the peak of the process's own live
tensors as `measure_peak` counts them, and the peak of its anonymous resident memory above the level before the call.
"""

from __future__ import annotations

import argparse
import time

import monai.networks.nets as nets
import torch
from process_memory import Resident

from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.memory import measure_peak

GIB = 2**30


def main() -> None:
    """Print one line per number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--classes", type=int, default=104)
    parser.add_argument("--partitions", type=int, default=32)
    parser.add_argument("--store", default="host", help="'host' or a folder")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = nets.BasicUNet(out_channels=options.classes, features=(2, 2, 2, 2, 2, 2)).eval()
    x = torch.rand(1, 1, *[options.side] * 3)
    inferer = SpatialPartitionInferer(options.partitions, store=options.store, labels=True)
    cpu = time.process_time()
    with measure_peak("cpu") as meter, Resident() as resident:
        labels = inferer(x, model)
    report = inferer.last_report
    assert report is not None
    print(f"{options.classes} classes at {options.side}^3 in {options.partitions} parts, store {options.store}")
    print(f"logits of the whole, float32: {options.classes * x.nbytes / GIB:.1f} GiB; never made")
    live = f"live tensors of the process {meter.peak_bytes / GIB:.2f} GiB"
    print(f"device peak {report.device_peak_bytes / GIB:.2f} GiB, {live}")
    print(f"anonymous resident memory {resident.peak[0] / GIB:.2f} GiB, with mapped files {resident.peak[1] / GIB:.2f}")
    print(f"moved {report.moved_bytes / 1e9:.1f} GB, {report.seconds:.0f} s, {time.process_time() - cpu:.0f} CPU-s")
    print(f"labels {tuple(labels.shape)} {labels.dtype}, {len(labels[..., ::8, ::8].unique())} different ones")


if __name__ == "__main__":
    main()

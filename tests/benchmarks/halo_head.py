"""Streams a MONAI UNet over a whole head CT that does not fit a budget at once; reports what each way costs.

    python tests/benchmarks/halo_head.py [--partitions 16] [--budget 0.5] [--stores whole host /scratch/halo]

The weights are random: what the network predicts means nothing, what it costs does. The whole volume's activation peak
comes from the dry run that `partitions="auto"` uses; it is also measured on two smaller crops, so that the dry run can
be judged. Each store runs in a process of its own, which reports the device peak (activations), the bytes moved, the
wall and CPU seconds, and the resident memory of the process above its level with network and volume loaded (anonymous
memory, and in brackets with pages of mapped files, which the system may drop). "whole" runs the network as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import monai.networks.nets as nets
import nibabel
import torch
from process_memory import Resident
from torch import nn

from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.halo.inferer import StreamingReport, _padded, whole_peak_bytes
from monai_memeff.memory import measure_peak

GIB = 2**30


def network(width: int) -> nn.Module:
    """The UNet of MONAI's spleen bundle with instance norm, which needs statistics of the whole volume."""
    torch.manual_seed(0)
    channels = [width * 2**i for i in range(5)]
    return nets.UNet(3, 1, 2, channels, (2, 2, 2, 2), num_res_units=2, norm="instance").eval()


def load(image: Path) -> torch.Tensor:
    """The head as (1, 1, H, W, D) float32 in [0, 1]."""
    data = nibabel.load(image).get_fdata(dtype="float32")
    return torch.from_numpy(data)[None, None].div_(1024).add_(0.5).clamp_(0, 1)


def stream(options: argparse.Namespace, store: str) -> dict[str, float]:
    """One run with one store, in this process."""
    model, x = network(options.width), load(options.image)
    inferer = SpatialPartitionInferer(
        options.partitions or "auto", store=store, memory_budget=int(options.budget * GIB), labels=options.labels
    )
    cpu, began = time.process_time(), time.perf_counter()
    with Resident() as resident, torch.no_grad():
        model(_padded(x, [16] * 3)) if store == "whole" else inferer(x, model)
    report = inferer.last_report or StreamingReport(1, whole_peak(model, x.shape), 0, time.perf_counter() - began)
    return {
        "partitions": report.partitions, "device": report.device_peak_bytes, "moved": report.moved_bytes,
        "seconds": report.seconds, "cpu": time.process_time() - cpu, "anonymous": resident.peak[0],
        "resident": resident.peak[1],
    }  # fmt: skip


def judge_dry_run(options: argparse.Namespace, shape: torch.Size) -> None:
    """Print what the whole volume would take, and the dry run beside measurements where these fit."""
    model = network(options.width)
    for side in (64, 96):
        small = torch.rand(1, 1, side, side, side)
        with torch.no_grad(), measure_peak("cpu") as meter:
            model(small)
        dry = whole_peak_bytes(model, small.shape, small.dtype)
        print(f"{side}^3: dry run {dry / GIB:.3f} GiB, measured {meter.peak_bytes / GIB:.3f} GiB above the volume")
    peak = whole_peak(model, shape)
    verdict = "fits" if peak <= options.budget * GIB else "does not fit"
    print(f"the whole head: {peak / GIB:.2f} GiB, which {verdict} a budget of {options.budget} GiB")


def whole_peak(model: nn.Module, shape: torch.Size) -> int:
    """Activation bytes of the whole volume at once, padded to the network's stride."""
    return whole_peak_bytes(model, [1, 1, *(-(-n // 16) * 16 for n in shape[2:])], torch.float32)


def main() -> None:
    """Print one line per store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    head = Path(os.environ.get("MEMEFF_DATA", beside)) / "head_ct" / "vhf_head_ct.nii.gz"
    parser.add_argument("--image", type=Path, default=head)
    parser.add_argument("--partitions", type=int, default=0, help="0: as few as fit the budget")
    parser.add_argument("--budget", type=float, default=0.5, help="GiB of activations on the device")
    parser.add_argument("--width", type=int, default=16, help="channels of the first level")
    parser.add_argument("--labels", action="store_true", help="write labels instead of logits")
    parser.add_argument(
        "--stores", nargs="+", default=["host"], help="'host', folders, or 'whole' for the whole at once"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.image.is_file():
        raise SystemExit(f"no image at {options.image}: set MEMEFF_DATA, or name one with --image.")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.one:
        print(json.dumps(stream(options, options.one)))
        return
    shape = torch.Size([1, 1, *nibabel.load(options.image).shape])
    print(f"{options.image.name} {tuple(shape[2:])}, MONAI UNet of width {options.width}, float32")
    judge_dry_run(options, shape)
    for store in options.stores:
        run = [sys.executable, __file__, *sys.argv[1:], "--one", store]
        r = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(
            f"{store}: {r['partitions']} partitions, device peak {r['device'] / GIB:.2f} GiB, moved "
            f"{r['moved'] / 1e9:.1f} GB, {r['seconds']:.0f} s ({r['cpu']:.0f} CPU-s), process "
            f"{r['anonymous'] / GIB:.2f} GiB above its start ({r['resident'] / GIB:.2f} with mapped files)",
            flush=True,
        )


if __name__ == "__main__":
    main()

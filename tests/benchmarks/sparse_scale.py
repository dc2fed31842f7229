"""The published tables of memory: skull completion against resolution and against batch size, in three engines.

    python tests/benchmarks/sparse_scale.py                                     # both tables on a generated skull
    python tests/benchmarks/sparse_scale.py --image vhf_head_ct.nii.gz          # on a real head
    python tests/benchmarks/sparse_scale.py --table resolution --resolutions 512 --engines native --use_checkpoint

One step is everything that a new volume costs: voxel sets, kernel maps, the network, in training also the loss and all
gradients. Every cell of the tables has a process of its own. "tensors" is what `measure_peak` counts, "process" how far
the resident set rose; MinkowskiEngine's kernel maps are not tensors, so compare processes with it. The logits have the
signs of a perfect network, so that every engine has the same candidates, and as many as a trained network has. The
volume is r x r x r / 2. On a machine that others use too, look at the ratio of CPU times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

RESOLUTIONS = (64, 128, 256, 512)
BATCHES = (1, 2, 4, 8, 16, 32)
DENSE_LIMIT = 8e9
"""Bytes that a dense step may be expected to need; larger cells of the table stay empty."""

ENOUGH_SECONDS = 20.0
"""A step that takes longer is not repeated."""


def main() -> None:
    """Parse the command line, run every cell in a fresh process and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", default=["resolution", "batch"], choices=["resolution", "batch"])
    parser.add_argument("--image", help="CT, 512 x 512 x at most 256; default a generated skull")
    parser.add_argument("--occupancy", type=float, default=0.12, help="of the generated skull")
    parser.add_argument("--resolutions", nargs="+", type=int, default=list(RESOLUTIONS), choices=RESOLUTIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--batch-resolution", type=int, default=64, choices=RESOLUTIONS)
    parser.add_argument("--channels", nargs="+", default=["ch1", "ch2", "ch512"], choices=["ch1", "ch2", "ch512"])
    parser.add_argument("--modes", nargs="+", default=["train", "test"], choices=["train", "test"])
    parser.add_argument("--engines", nargs="+", default=["native", "minkowski", "dense"])
    parser.add_argument("--use_checkpoint", action="store_true", help="recompute activations (native)")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16 (native)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, help="append every cell as a line of JSON, with the calls of torch that it makes"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(_run(json.loads(options.cell))))
        return
    if "resolution" in options.table:
        sizes = [{"resolution": r, "batch": 1} for r in options.resolutions]
        _table(options, sizes, "memory against resolution, batch 1")
    if "batch" in options.table:
        sizes = [{"resolution": options.batch_resolution, "batch": b} for b in options.batches]
        _table(options, sizes, f"memory against batch size at {options.batch_resolution}")


def _table(options: argparse.Namespace, sizes: list[dict], title: str) -> None:
    print(f"\n{title}\n")
    print("| channels | mode | resolution | batch | engine | candidates ", end="")
    print("| CPU-s | x ours | process MB | x ours | tensors MB |\n|" + "---|" * 11)
    for channels, mode, size in product(options.channels, options.modes, sizes):
        ours: dict = {}
        for engine in options.engines:
            cell = {**size, "channels": channels, "mode": mode, "engine": engine, "repeats": options.repeats}
            cell |= {"image": options.image, "occupancy": options.occupancy, "threads": options.threads}
            native = engine == "native"
            cell |= {"amp": options.amp and native, "use_checkpoint": options.use_checkpoint and native}
            found = {**cell, **_in_fresh_process(cell)}
            ours = found if engine == "native" else ours
            print(_row(found, ours), flush=True)
            if options.output:
                with options.output.open("a") as lines:
                    print(json.dumps(found), file=lines)


def _row(found: dict, ours: dict) -> str:
    name = [found[key] for key in ("channels", "mode", "resolution", "batch", "engine")]
    if "refused" in found:
        return "| " + " | ".join(map(str, [*name, found["refused"], "", "", "", "", ""])) + " |"
    ratios = (
        ["", ""]
        if not ours or "refused" in ours
        else [f"{found[key] / ours[key]:.2f}" for key in ("cpu_seconds", "process_bytes")]
    )
    numbers = [f"{found['cpu_seconds']:.2f}", ratios[0], f"{found['process_bytes'] / 1e6:.0f}", ratios[1]]
    return (
        "| " + " | ".join(map(str, [*name, found["candidates"], *numbers, f"{found['tensor_bytes'] / 1e6:.0f}"])) + " |"
    )


def _in_fresh_process(cell: dict) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(cell["threads"]), "OPENBLAS_NUM_THREADS": str(cell["threads"])}
    command = [sys.executable, "-W", "ignore", __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"refused": (done.stderr.strip().splitlines() or [f"killed ({done.returncode})"])[-1][:80]}
    return json.loads(done.stdout.splitlines()[-1])


def _run(cell: dict) -> dict:
    import torch
    from process_memory import peak_resident_bytes
    from sparse_scale_networks import CHANNELS, STEPS, Case, generated, head

    from monai_memeff.memory import measure_peak

    torch.manual_seed(0)
    expected = _dense_bytes(cell, CHANNELS[cell["channels"]][0])
    if cell["engine"] == "dense" and expected > DENSE_LIMIT:
        return {"refused": f"not run: about {expected / 1e9:.0f} GB"}
    volume = (
        head(cell["image"], cell["resolution"]) if cell["image"] else generated(cell["resolution"], cell["occupancy"])
    )
    case = Case(volume, cell["batch"])
    del volume
    make = STEPS[cell["engine"]]
    make(Case(generated(64), 2), cell["channels"], cell["mode"], cell)()  # what the first step of a process loads
    step = make(case, cell["channels"], cell["mode"], cell)
    found: dict = {"voxels": len(case.defective)}
    times: list[float] = []

    def timed() -> None:
        step.net.zero_grad(set_to_none=True)  # as every training step does
        start = time.process_time()
        found["result"] = step()
        times.append(time.process_time() - start)

    found["process_bytes"] = peak_resident_bytes(timed)
    step.net.zero_grad(set_to_none=True)
    with measure_peak() as meter:
        step()
    found["tensor_bytes"] = meter.peak_bytes
    step.net.zero_grad(set_to_none=True)
    found["calls"] = _calls_of(step)
    while times[0] < ENOUGH_SECONDS and len(times) < 1 + cell["repeats"]:
        timed()
    found["cpu_seconds"] = min(times)
    found["candidates"] = found["result"] if cell["mode"] == "test" else ""
    return found


def _calls_of(step: Callable[[], object]) -> int:
    """How many operations of torch's a step starts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        step()
    return counting.calls


def _dense_bytes(cell: dict, channels: int) -> float:
    """A rough count of what a dense step holds: maps of the finest level, two thirds of all."""
    maps = 12 if cell["mode"] == "train" else 4
    return cell["resolution"] ** 3 / 2 * cell["batch"] * channels * 4 * maps * 1.4


if __name__ == "__main__":
    main()

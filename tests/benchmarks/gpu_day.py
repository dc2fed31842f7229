"""One command for the day a GPU is there: sections in the order of their worth, rows written as soon as they are known.

    python tests/benchmarks/gpu_day.py --jsonl gpu_day.jsonl                 # everything, under ten minutes
    python tests/benchmarks/gpu_day.py --sections tests exact stream --minutes 3 --jsonl gpu_day.jsonl
    python tests/benchmarks/gpu_day.py --toy --jsonl rows.jsonl              # a dry run on a fake CUDA device, no times

A section begins only while its seconds are left; what fails is a row with its reason, and one that crashes, hangs or
leaves the device in an error ends its own process only. Peaks are those of torch's
allocator above what was there before; seconds are wall time with the device synchronized. The fake device cannot be
captured in a graph, so the dry run of `exact` and `stream` is the CPU's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.supervised import BEGINS, POISONED, supervise  # noqa: E402 as a script it has another path

GPU_TESTS = ("tests/test_on_gpu.py", "tests/halo", "tests/sparse/networks", "tests/memory", "tests/occupancy")
Row = dict[str, Any]


@dataclass(frozen=True)
class Day:
    """Where and how large: the sizes of `--toy` are for a CPU."""

    device: torch.device
    toy: bool

    @property
    def captured(self) -> torch.device:
        """Where networks live that are captured as a graph."""
        return torch.device("cpu") if self.toy else self.device

    def size(self, full: int, toy: int = 16) -> int:
        """An extent of this day."""
        return toy if self.toy else full

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.toy:
            torch.cuda.synchronize()

    def measure(self, work: Callable[[], Any]) -> tuple[Any, Row]:
        """The result of some work, its seconds and its peak."""
        if not self.toy:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = 0 if self.toy else torch.cuda.memory_allocated()
        self.synchronize()
        start = time.perf_counter()
        result = work()
        self.synchronize()
        seconds = time.perf_counter() - start
        peak = 0 if self.toy else torch.cuda.max_memory_allocated() - before
        return result, {"seconds": round(seconds, 3), "peak_gib": round(peak / 2**30, 3)}


def tests(day: Day) -> Iterator[Row]:
    """The tests that use a GPU, in several processes."""
    if day.toy:
        yield {"skipped": "a dry run does not run tests in tests"}
        return
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--maxfail=20"]
    command += ["-n", "10"] if importlib.util.find_spec("xdist") else []
    command += ["-m", "not exhaustive", *GPU_TESTS]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        status = run_for(command, 100, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        lines = output.read().splitlines()
    yield {
        "status": "stopped after 100 s" if status is None else status,
        "summary": lines[-1][-300:] if lines else "",
        "failed": [x for x in lines if x.startswith(("FAILED", "E  "))],
    }


def run_for(command: list[str], seconds: float, **streams: Any) -> int | None:
    """The exit status of a command, None where it was stopped with all that it had started."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # where nothing is installed
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None


def plain_unet(features: tuple[int, ...] = (16, 32, 64, 128), classes: int = 4) -> nn.Module:
    """nnU-Net's plain U-Net, or one of torch's own layers where its package is missing."""
    try:
        from dynamic_network_architectures.architectures.unet import PlainConvUNet
    except ImportError:
        from monai.networks.nets.unet import UNet

        return UNet(3, 1, classes, features, (2,) * (len(features) - 1), num_res_units=2)
    depth = len(features)
    convs, strides, kernels = [2] * depth, [1] + [2] * (depth - 1), [3] * depth
    norm = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}}
    act = {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    return PlainConvUNet(
        1, depth, features, nn.Conv3d, kernels, strides, convs, classes, convs[1:], conv_bias=True, **norm, **act
    )


def faultseg_unet() -> nn.Module:
    """A U-Net of FaultSeg3D's size: 16, 32, 64, 128 features, one output channel, no norm."""
    from monai.networks.nets.basic_unet import BasicUNet

    return BasicUNet(3, 1, 1, (16, 32, 64, 128, 256, 16), act=("relu", {"inplace": True}), norm=("batch", {}))


def exact(day: Day) -> Iterator[Row]:
    """Streaming against the whole on one card: largest difference, peak and seconds."""
    from monai_memeff.halo import SpatialPartitionInferer

    n = day.size(256, 32)
    volume = torch.randn(1, 1, n, n - 8, n - 16)
    for name, make in (("plain", plain_unet), ("faultseg", faultseg_unet)):
        torch.manual_seed(0)
        network = make().to(day.captured).eval()
        with torch.no_grad(), full_precision():
            on_device = volume.to(day.captured)
            whole, row = day.measure(lambda net=network, x=on_device: net(x).cpu())
            yield {"network": name, "shape": list(volume.shape), "parts": 1, **row}
            for parts in (8, 16):
                inferer = SpatialPartitionInferer(parts)
                inferer(volume, network)
                found, row = day.measure(lambda net=network, run=inferer: run(volume, net))
                yield {
                    "network": name,
                    "shape": list(volume.shape),
                    "parts": parts,
                    **row,
                    "difference": float((found - whole).abs().max() / whole.abs().max()),
                    **report(inferer),
                }


def report(inferer: Any) -> Row:
    """The numbers of an inferer's last call."""
    last = inferer.last_report
    return {
        "planned_gib": round(last.planned_peak_bytes / 2**30, 3),
        "counted_gib": round(last.device_peak_bytes / 2**30, 3),
        "moved_gib": round(last.moved_bytes / 2**30, 2),
        "plan_seconds": round(last.plan_seconds, 2),
        "tiles": last.partitions,
    }


def stream(day: Day) -> Iterator[Row]:
    """Whole volumes through one card within a budget."""
    from monai_memeff.halo import SpatialPartitionInferer

    for name, make, edge, budget in (("plain", plain_unet, 512, 8), ("faultseg", faultseg_unet, 1024, 24)):
        n = day.size(edge, 16)
        torch.manual_seed(0)
        network = make().to(day.captured).eval()
        volume = torch.randn(1, 1, n, n, n)
        inferer = SpatialPartitionInferer("auto", memory_budget=budget * 2**30, labels=True)
        with torch.no_grad():
            _, row = day.measure(lambda net=network, run=inferer, x=volume: run(x, net))
        yield {"network": name, "shape": list(volume.shape), "budget_gib": budget, **row, **report(inferer)}


def sparse(day: Day) -> Iterator[Row]:
    """A training step of the completion network on a generated skull, engine by engine."""
    from monai_memeff.apps.skull.phantom import HEAD_LABELS, head_phantom
    from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet, backends

    for edge in (64, 128, 256):
        n = day.size(edge, 16)
        head = head_phantom((n, n, n), 256 / n)
        skull = (head.labels == HEAD_LABELS["skull"]).float()[None, None].to(day.device)
        for engine in ("native",) if day.toy else ("native", "triton", "spconv_triton", "spconv"):
            try:
                backends.use(engine)
                torch.manual_seed(0)
                network, loss = SparseCompletionNet().to(day.device), SparseCompletionLoss()

                def step(net: nn.Module = network, criterion: nn.Module = loss, x: Tensor = skull) -> None:
                    criterion(net(x, x), x).backward()

                for _ in range(1 if day.toy else 4):
                    step()
                _, row = day.measure(lambda run=step: [run() for _ in range(1 if day.toy else 5)])
                row["seconds"] = round(row["seconds"] / (1 if day.toy else 5), 4)
                yield {"engine": engine, "edge": n, "voxels": int(skull.sum()), **row}
            except Exception as error:  # a library fails in its own ways
                yield {"engine": engine, "edge": n, "reason": str(error)[:200]}
            finally:
                backends.use(None)


def clstm(day: Day) -> Iterator[Row]:
    """A training step of the published C-LSTM on 512 x 512 x 320."""
    from monai_memeff.clstm import CLSTMUNet

    n, depth = day.size(512, 16), day.size(320, 4)
    channels = (4, 8) if day.toy else (64, 128, 256, 512, 1024)
    torch.manual_seed(0)
    network = CLSTMUNet(3, 1, 2, channels, hidden_channels=8, norm="instance", checkpoint="slice").to(day.device)
    volume = torch.randn(1, 1, n, n, depth)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = network(volume.to(day.device))
        logits.float().square().mean().backward()

    _, row = day.measure(step)
    yield {"shape": list(volume.shape), **row}


def hou(day: Day) -> Iterator[Row]:
    """A training step of Hou's network in mixed precision on one card, at the largest edge that fits."""
    from monai_memeff.halo.unet import FEATURES, VolumeUNet

    features = (4, 8) if day.toy else FEATURES[512]
    for edge in (256, 384, 512):
        n = day.size(edge, 16)
        torch.manual_seed(0)
        network = VolumeUNet(features=features).to(day.device)
        volume = torch.randn(1, 1, n, n, n)

        def step(net: nn.Module = network, x: Tensor = volume) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                logits = net(x.to(day.device))
            logits.float().mean().backward()

        _, row = day.measure(step)
        yield {"shape": list(volume.shape), "parameters": sum(p.numel() for p in network.parameters()), **row}
        if day.toy:
            return


def convolutions(day: Day) -> Iterator[Row]:
    """The table of single sparse convolutions, by its own script."""
    engines = ("native", "triton", "spconv_triton", "spconv")
    sizes = ("--cases", "50k", "250k", "--channels", "32", "64", "--minutes", "1", "--patience", "15")
    yield from convolution_table(day, engines, sizes, 75)


def ocnn(day: Day) -> Iterator[Row]:
    """One row of the same with ocnn, whose tuner compiles a hundred kernels before its first number."""
    sizes = ("--cases", "50k", "--channels", "32", "--dtypes", "float16", "--minutes", "1", "--patience", "100")
    yield from convolution_table(day, ("native", "ocnn") if day.toy else ("triton", "ocnn"), sizes, 115)


def convolution_table(day: Day, engines: tuple[str, ...], sizes: tuple[str, ...], seconds: float) -> Iterator[Row]:
    """The rows that the script has written when it ends or is stopped, and why engines have no number."""
    script = [sys.executable, str(ROOT / "tests/benchmarks/sparse_gpu.py"), "--engines", *engines]
    options = ("--toy", "--channels", "16", "--dtypes", "float32") if day.toy else sizes
    with tempfile.TemporaryDirectory() as folder:
        rows, said, errors = (Path(folder) / name for name in ("rows.jsonl", "said.txt", "errors.txt"))
        with said.open("w") as output, errors.open("w") as trouble:
            status = run_for([*script, *options, "--jsonl", str(rows)], seconds, stdout=output, stderr=trouble)
        for line in rows.read_text("utf-8").splitlines() if rows.exists() else ():
            yield json.loads(line)
        for line in said.read_text("utf-8").splitlines():
            if line.startswith("# ") and (" left out" in line or " no number" in line):
                yield {"missing": line[2:]}
        if status != 0:
            why = f"stopped after {seconds:g} s" if status is None else errors.read_text("utf-8")[-300:]
            yield {"reason": why}


SECTIONS: dict[str, tuple[Callable[[Day], Iterator[Row]], int]] = {
    "exact": (exact, 60),
    "stream": (stream, 60),
    "tests": (tests, 110),
    "sparse": (sparse, 60),
    "clstm": (clstm, 60),
    "hou": (hou, 60),
    "convolutions": (convolutions, 80),
    "ocnn": (ocnn, 120),
}
"""Name -> what it does, and the seconds that must be left for it to begin; after twice as many it is stopped."""


GRACE = 15.0
"""Seconds beyond the minutes after which everything is stopped."""

CAPTURED = ("exact", "stream")
"""Sections whose networks are captured as a graph, which the fake device cannot."""


def fake_device() -> contextlib.AbstractContextManager[Any]:
    """The tests' CUDA device without a GPU."""
    from tests.fake_cuda import fake_cuda_device

    return fake_cuda_device()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions without TF32, so that a difference is a difference."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def run_sections(day: Day, names: list[str], minutes: float, jsonl: Path) -> int:
    """Run the sections in order while time is left; the number of sections that failed."""
    end, failed = time.monotonic() + 60 * minutes, 0
    card = "fake CUDA device" if day.toy else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    about = {"device": card, "date": datetime.date.today().isoformat(), **versions}
    for name in names:
        work, seconds = SECTIONS[name]
        if not day.toy and time.monotonic() + seconds > end:
            write(jsonl, {"section": name, **about, "skipped": f"less than {seconds} s left"})
            continue
        print(f"{BEGINS}{name}", flush=True)
        try:
            with fake_device() if day.toy and name not in CAPTURED else contextlib.nullcontext():
                for row in work(day):
                    write(jsonl, {"section": name, **about, **row})
        except Exception as error:  # the next section is worth running whatever this one met
            failed += 1
            where = re.sub(r"\s+", " ", "".join(traceback.format_tb(error.__traceback__)[-2:]))
            where = where.replace(f"{ROOT}{os.sep}", "")
            write(
                jsonl, {"section": name, **about, "error": f"{type(error).__name__}: {str(error)[:300]}", "at": where}
            )
            if not day.toy and is_poisoned():
                sys.exit(POISONED)
    return failed


def is_poisoned() -> bool:
    """Whether the device is in an error that only another process can leave; else what the section held is freed."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def supervise_sections(options: argparse.Namespace) -> int:
    """Run the sections in processes of their own, and write a row for each that ends its process."""

    def command(names: list[str], seconds: float) -> list[str]:
        script = [sys.executable, str(Path(__file__).resolve()), "--inside", "--jsonl", str(options.jsonl)]
        return [*script, *(["--toy"] if options.toy else []), "--minutes", str(seconds / 60), "--sections", *names]

    def report(name: str, reason: str) -> None:
        write(options.jsonl, {"section": name, "error": reason})

    limits = {name: 2.0 * SECTIONS[name][1] for name in options.sections}
    return supervise(command, limits, 60 * options.minutes + GRACE, report)


def write(jsonl: Path, row: Row) -> None:
    """Append a row and show it."""
    line = json.dumps(row)
    with jsonl.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--jsonl", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a fake CUDA device")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.toy:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("this script needs a CUDA device, and torch finds none; --toy is a dry run on a fake one.")
    if not options.inside:
        sys.exit(1 if supervise_sections(options) else 0)
    day = Day(torch.device("cuda"), options.toy)
    sys.exit(1 if run_sections(day, options.sections, options.minutes, options.jsonl) else 0)


if __name__ == "__main__":
    main()

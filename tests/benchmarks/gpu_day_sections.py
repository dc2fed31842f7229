"""Sections of the script for the day a GPU is there: each yields its rows as soon as they are known."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from tests.benchmarks.supervised import WITH_PARENT

ROOT = Path(__file__).resolve().parents[2]

GPU_TESTS = (
    "tests/test_on_gpu.py",
    "tests/halo/test_on_cuda.py",
    "tests/halo/ranks/test_for_gpus.py",
    "tests/memory",
    "tests/occupancy/test_octree_inferer.py",
    "tests/sparse/test_inferer.py",
    "tests/sparse/core/test_for_gpus.py",
    "tests/sparse/backends",
    "tests/geometry/test_key_lists.py",
)
TESTS_STOP = 150
"""Seconds for them."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Day:
    """Where and how large: the sizes of `--toy` are for a CPU."""

    device: torch.device
    toy: bool
    organs: Path | None = None
    organs_seconds: float = 60.0

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

    def attempt(self, work: Callable[[], Any]) -> Row:
        """The seconds and the peak of some work, or that the device's memory did not suffice."""
        try:
            return self.measure(work)[1]
        except torch.OutOfMemoryError as error:
            reason = str(error)[:300]
        return {"reason": reason}  # outside: the error holds the frames, and they the tensors


def tests(day: Day) -> Iterator[Row]:
    """The tests that use a GPU, in several processes."""
    if day.toy:
        yield {"skipped": "a dry run does not run tests in tests"}
        return
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-n", "14"] if importlib.util.find_spec("xdist") else []
    command += ["-m", "not exhaustive", *GPU_TESTS]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        status = run_for(command, TESTS_STOP, OMP_NUM_THREADS="1", stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        lines = output.read().splitlines()
    yield {
        "status": f"stopped after {TESTS_STOP} s" if status is None else status,
        "summary": lines[-1][-300:] if lines else "",
        "failed": [x[:300] for x in lines if x.startswith(("FAILED", "ERROR", "E  ", "[gw"))][:80],
    }


def run_for(command: list[str], seconds: float, OMP_NUM_THREADS: str = "", **streams: Any) -> int | None:  # noqa: N803
    """The exit status of a command, None where it was stopped with all that it had started."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # where nothing is installed
    environment = {**os.environ, "PYTHONPATH": path}
    environment |= {"OMP_NUM_THREADS": OMP_NUM_THREADS} if OMP_NUM_THREADS else {}
    streams |= {"start_new_session": True, "preexec_fn": WITH_PARENT}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as process:
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


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions without TF32, so that a difference is a difference."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


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

    single, half = torch.float32, torch.float16
    for name, make, edge, budget, dtype in (
        ("plain", plain_unet, 512, 8, single),
        ("faultseg", faultseg_unet, 640, 24, single),
        ("faultseg", faultseg_unet, 1024, 24, half),  # stores 72 GiB, in single precision 144
    ):
        n = day.size(edge, 16)
        torch.manual_seed(0)
        network = make().to(day.captured, dtype).eval()
        volume = torch.randn(1, 1, 1, n, n).to(dtype).repeat(1, 1, n, 1, 1)
        inferer = SpatialPartitionInferer("auto", memory_budget=budget * 2**30, labels=True)
        about = {"network": name, "dtype": str(dtype).removeprefix("torch."), "shape": list(volume.shape)}
        try:
            with torch.no_grad():
                _, row = day.measure(lambda net=network, run=inferer, x=volume: run(x, net))
        except MemoryError as error:  # of the host, before the run
            yield {**about, "reason": str(error)}
            continue
        yield {**about, "budget_gib": budget, **row, **report(inferer)}


SPARSE_SECONDS = {"native": 15, "triton": 30, "spconv": 15, "spconv_triton": 20}
"""Of each engine, the last of which may hang."""


def sparse(day: Day) -> Iterator[Row]:
    """A training step of the completion network on a generated skull, each engine in a process of its own."""
    if day.toy:
        from tests.benchmarks.sparse_step import measured

        yield from measured("native", [day.size(64)], day.device, dry=True)
        return
    for engine, seconds in SPARSE_SECONDS.items():
        yield from rows_of("sparse_step.py", ("--engine", engine), seconds)


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
    """A training step of Hou's network in mixed precision on one card, activations kept or recomputed."""
    from monai_memeff.halo.unet import FEATURES, VolumeUNet

    features = (4, 8) if day.toy else FEATURES[512]
    for edge, again in itertools.product((256,) if day.toy else (256, 384, 512), (False, True)):
        n = day.size(edge, 16)
        torch.manual_seed(0)
        network = VolumeUNet(features=features, use_checkpoint=again).to(day.device)
        volume = torch.randn(1, 1, n, n, n, device=day.device)

        def step(net: nn.Module = network, x: Tensor = volume) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                logits = net(x)
            logits.float().mean().backward()

        about = {"shape": list(volume.shape), "recomputed": again}
        about |= {"parameters": sum(p.numel() for p in network.parameters())}
        yield about | day.attempt(step)
        del network, volume, step  # a step that ran out of memory leaves its gradients there


def convolutions(day: Day) -> Iterator[Row]:
    """The table of single sparse convolutions, by its own script."""
    engines = ("native", "triton", "spconv", "spconv_triton")  # what may hang comes last
    sizes = ("--cases", "50k", "250k", "--channels", "32", "64", "--dtypes", "float16", "float32")
    yield from convolution_table(day, engines, (*sizes, "--turns", "8"), 75)


def ocnn(day: Day) -> Iterator[Row]:
    """One row of the same with ocnn, whose tuner compiles a hundred kernels before its first number."""
    sizes = ("--cases", "50k", "--channels", "32", "--dtypes", "float16")
    yield from convolution_table(day, ("native", "ocnn") if day.toy else ("triton", "ocnn"), sizes, 110)


def convolution_table(day: Day, engines: tuple[str, ...], sizes: tuple[str, ...], seconds: float) -> Iterator[Row]:
    """Its rows, and why engines have no number."""
    options = ("--toy", "--channels", "16", "--dtypes", "float32") if day.toy else sizes
    options += ("--minutes", str(seconds / 60))
    yield from rows_of("sparse_gpu.py", ("--engines", *engines, *options), seconds + 5)  # which stops in time by itself


def lean(day: Day) -> Iterator[Row]:
    """Stock nnU-Net's prediction of 61 classes against lean prediction: both peaks, seconds, voxels that differ."""
    if importlib.util.find_spec("nnunetv2") is None:
        yield {"skipped": "nnunetv2 is not installed"}
        return
    sizes = (
        "--classes",
        "61",
        "--output",
        *["256"] * 3,
        "--patch",
        *["96"] * 3,
        "--features",
        "32",
        "64",
        "128",
        "256",
    )
    toy = ("--classes", "3", "--output", *["20"] * 3, "--patch", *["16"] * 3, "--features", "2", "4")
    where = ("--device", "cpu") if day.toy else ("--device", "cuda")
    yield from rows_of("nnunet_lean.py", (*(toy if day.toy else sizes), "--scale", "1", *where), 115, "--record")


ORGAN_TRAINERS = ("SparseTrainer", "nnUNetTrainer", "OccupancyTrainer", "ResEncM", "HaloTrainer", "CLSTMTrainer")


def organs(day: Day) -> Iterator[Row]:
    """The organ comparison, a trainer at a time, on data that `nnunet_organs.py prepare` has made."""
    if day.organs is None:
        yield {"skipped": "--organs names no folder of nnunet_organs.py"}
        return
    os.environ.update(nnUNet_compile="f")  # would take most of so short a training
    for trainer in ORGAN_TRAINERS:
        words = ("run", "--work", str(day.organs), "--trainers", trainer, "--device", day.device.type)
        yield from rows_of("nnunet_organs.py", (*words, "--seconds", str(day.organs_seconds)), 4 * day.organs_seconds)


def rows_of(script: str, options: tuple[str, ...], seconds: float, rows_to: str = "--jsonl") -> Iterator[Row]:
    """The rows of a script of this folder as it writes them, and what it says is missing when it ends or is stopped."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        rows, said, errors = (Path(folder) / name for name in ("rows.jsonl", "said.txt", "errors.txt"))
        command = [sys.executable, str(ROOT / "tests/benchmarks" / script), *options, rows_to, str(rows)]
        rows.touch()
        with rows.open() as written, said.open("w") as output, errors.open("w") as trouble:
            process = pool.submit(run_for, command, seconds, stdout=output, stderr=trouble)
            yield from map(json.loads, lines_until(process, written))
        for line in said.read_text("utf-8").splitlines():
            if line.startswith("# ") and (" left out" in line or " no number" in line):
                yield {"missing": line[2:]}
        if process.result() != 0:
            stopped = process.result() is None
            yield {"reason": f"stopped after {seconds:g} s" if stopped else errors.read_text("utf-8")[-600:]}


def lines_until(end: Future[Any], file: TextIO) -> Iterator[str]:
    """The lines that another process writes into a file until it ends, each when it is whole."""
    kept = ""
    while True:
        ended = end.done()  # before the last look
        kept += file.read()
        *lines, kept = kept.split("\n")
        yield from lines
        if ended:
            return
        wait([end], timeout=0.3)


SECTIONS: dict[str, tuple[Callable[[Day], Iterator[Row]], int]] = {
    "exact": (exact, 60),
    "stream": (stream, 60),
    "tests": (tests, 160),
    "sparse": (sparse, 80),
    "clstm": (clstm, 60),
    "hou": (hou, 60),
    "lean": (lean, 120),
    "convolutions": (convolutions, 80),
    "ocnn": (ocnn, 120),
    "organs": (organs, 150),
}
"""Name -> what it does, and the seconds that must be left for it to begin; after twice as many it is stopped."""

"""Time of one submanifold convolution on shells on a GPU: triton against native, spconv, spconv_triton and ocnn.

    python tests/benchmarks/sparse_gpu.py                                  # every case; prints the tables
    python tests/benchmarks/sparse_gpu.py --cases 50k --channels 32 --dtypes bfloat16 --jsonl rows.jsonl
    python tests/benchmarks/sparse_gpu.py --toy                            # on the CPU: a check of the script, no times

native and triton run in one process; then every library in a process of its own, beside triton (or native), and one
that hangs, crashes or tunes for longer than its share of the time loses its own rows only. The engines of a process
have the same voxels, features, weights and output gradient, take turns, and their results are compared with native's
before anything is timed. Kernel maps and tables are planned beforehand, and every engine has run often enough to have
chosen its block sizes. Times are medians over the turns, by CUDA events around several calls as Python makes them,
launches included; what counts is the ratio within one row. An engine that is not usable has its reason printed and no
number; neither has one that leaves a dtype to native, fails, or is wrong in a row. TF32 is the libraries' own switch
and set here, but spconv keeps the kernels it chose first: TF32 only if float32 is not measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.supervised import BEGINS, supervise

SHELLS = {"50k": (128, 1.6), "100k": (192, 1.42), "250k": (256, 1.98), "500k": (384, 1.75), "1M": (512, 1.97)}
"""Name -> extent of the cubic volume, thickness of the ellipsoid shell in voxels."""

TOY = {"toy": (12, 1.5)}
ENGINES = ("native", "triton", "spconv", "spconv_triton", "ocnn")
LIBRARIES = ("spconv", "spconv_triton")
"""Those without bfloat16, with a switch of their own for TF32."""

OURS = ("native", "triton")
"""Those that run first, in one process; the others take their time to tune, and may hang in it."""

DTYPES = ("float16", "float32", "bfloat16", "tf32")
STEPS = ("forward", "both")

TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest allowed difference to native in float32, as a share of the largest value."""

BEGUN_BEFORE = 0.8
"""Share of a process's time after which it begins no row."""

WARM_UP_TURNS, FEWEST_TURNS = 2, 3
MOST_CALLS, MILLISECONDS_OF_A_TURN = 20, 20.0
SECONDS_OF_A_ROW = 4.0  # turns beyond the fewest are taken while they fit


def main() -> None:
    """Parse the command line, measure row by row, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(SHELLS), choices=list(SHELLS))
    parser.add_argument("--channels", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--turns", type=int, default=15, help="of every engine, interleaved, at most")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which all that runs is stopped")
    parser.add_argument("--jsonl", type=Path, help="append every row as soon as it is measured")
    parser.add_argument("--toy", action="store_true", help="a few voxels on the CPU in Triton's interpreter, no times")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # measure, in this process
    options = parser.parse_args()
    if options.inside:
        _inside(options)
    else:
        sys.exit(1 if _in_processes(options) else 0)


def processes(engines: list[str]) -> list[tuple[list[str], int]]:
    """The engines of every process, and its share of the time: half of it is ours where there are libraries."""
    ours = [name for name in engines if name in OURS]
    libraries = [[*ours[-1:], name] for name in engines if name not in OURS]
    first = [(ours, max(len(libraries), 1))] if len(ours) > bool(libraries) else []
    return [*first, *((names, 1) for names in libraries)]


def _in_processes(options: argparse.Namespace) -> int:
    """Run them one after another, what one leaves of its time for the next; the number of those that failed."""
    left, end, failed = processes(options.engines), time.monotonic() + 60 * options.minutes, 0
    while left:
        names, share = left[0]
        seconds = (end - time.monotonic()) * share / sum(share for _, share in left)
        failed += supervise(partial(_command, names), {names[-1]: seconds}, seconds, _say)
        del left[0]
    return failed


def _command(engines: list[str], _: list[str], seconds: float) -> list[str]:
    """One process: these words again, of which the last ones count."""
    words = ["--inside", "--engines", *engines, "--minutes", str(BEGUN_BEFORE * seconds / 60)]
    return [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], *words]


def _say(name: str, reason: str) -> None:
    print(f"# {name} has no number beyond these: {reason}", flush=True)


def _inside(options: argparse.Namespace) -> None:
    """Measure the engines of this process."""
    print(f"{BEGINS}{options.engines[-1]}", flush=True)
    if options.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not options.toy and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch finds none; --toy checks the script on the CPU.")
    rows = []
    for row in _measure(options, torch.device("cpu" if options.toy else "cuda")):
        rows.append(row)
        if options.jsonl:
            with options.jsonl.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if rows:
        _print_tables(rows, options.engines)


def _measure(options: argparse.Namespace, device: Any) -> Iterator[dict]:
    """Row by row, all shells for one dtype and number of channels, for which the engines tune once."""
    import torch

    from monai_memeff.sparse.backends import registry

    deadline = time.monotonic() + 60 * options.minutes
    engines: list[str] = []
    for name in reversed(options.engines):  # self-tests of no others
        reason = registry._reason(name, device)
        if reason is None:
            engines.insert(0, name)
            continue
        print(f"# {name} is left out: {reason}", flush=True)
        if name not in OURS:
            return
    print(f"# {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    shells = TOY if options.toy else {case: SHELLS[case] for case in options.cases}
    geometries = {case: _geometry(*size, device) for case, size in shells.items()}
    for dtype in options.dtypes:
        for channels in options.channels:
            for case, geometry in geometries.items():
                if time.monotonic() > deadline:
                    print(f"# {options.minutes:g} minutes are over before {case} C{channels} {dtype}", file=sys.stderr)
                    return
                problem = Problem(geometry, channels, dtype)
                pairs = geometry.kernel_map.num_pairs
                row = {"case": case, "voxels": problem.voxels, "pairs": pairs, "channels": channels, "dtype": dtype}
                yield row | _row(problem, engines, options, device)
                print(f"# {case} C{channels} {dtype} done", file=sys.stderr)


def _row(problem: Problem, engines: list[str], options: argparse.Namespace, device: Any) -> dict:
    """Differences, seconds of the first calls and times of the engines."""
    import torch

    found: dict[str, dict] = {"differences": {}, "first_seconds": {}, "left_out": {}, "milliseconds": {}}
    for name in [name for name in engines if _takes(name, problem.name, options.dtypes)]:
        start = time.monotonic()
        try:
            worst = found["differences"][name] = problem.difference(name)
            if not worst <= TOLERANCES[problem.name]:
                found["left_out"][name] = f"differs by {worst:.1e}, allowed {TOLERANCES[problem.name]:.0e}"
        except Exception as error:  # a library may fail in any way of its own; the others go on
            found["left_out"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
        found["first_seconds"][name] = round(time.monotonic() - start, 2)
    for name, reason in found["left_out"].items():
        print(
            f"# {name} has no number for {problem.voxels} voxels, C{problem.channels} {problem.name}: {reason}",
            flush=True,
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # spconv allocates beside torch
        ready = [name for name in found["differences"] if name not in found["left_out"]]
        found["milliseconds"] = _take_turns(problem, ready, options.turns) if ready else {}
    return found


def _takes(engine: str, dtype: str, dtypes: list[str]) -> bool:
    """Whether an engine computes a dtype itself: the spconvs have no bfloat16, and see above for TF32."""
    if engine == "spconv" and dtype == "tf32":
        return "float32" not in dtypes
    return dtype != "bfloat16" or engine not in LIBRARIES


def _geometry(extent: int, thickness: float, device: Any) -> Any:
    from sparse_engines import ellipsoid_shell

    from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
    from monai_memeff.sparse.core.neighbors import KernelShape
    from monai_memeff.sparse.core.voxel_set import VoxelSet

    keys = ellipsoid_shell(extent, thickness).flatten().nonzero()[:, 0].to(device)
    voxels = VoxelSet(keys, (extent,) * 3, 1)
    return ConvolutionGeometry(voxels, voxels, KernelShape((3, 3, 3), padding=(1, 1, 1)))


class Problem:
    """One convolution, the same for every engine."""

    def __init__(self, geometry: Any, channels: int, dtype: str) -> None:
        import torch

        torch.manual_seed(0)
        self.geometry, self.voxels, self.channels, self.name = geometry, len(geometry.inputs), channels, dtype
        self.dtype, self.tf32 = getattr(torch, "float32" if dtype == "tf32" else dtype), dtype == "tf32"
        device, scale = geometry.inputs.device, (27 * channels) ** -0.5
        self.features, self.cotangent = (
            torch.randn(self.voxels, channels, device=device).to(self.dtype) for _ in range(2)
        )
        self.weight = torch.randn(27, channels, channels, device=device).mul(scale).to(self.dtype)
        self.exact: tuple[Any, ...] | None = None

    def step(self, engine: str, kind: str) -> Callable[[], Any]:
        """The forward pass without a graph, or forward and backward; to be run within :func:`_tf32`."""
        return self._step(engine, kind, self.features, self.weight, self.cotangent)

    def _step(self, engine: str, kind: str, features: Any, weight: Any, cotangent: Any) -> Callable[[], Any]:
        import torch

        from monai_memeff.sparse.backends import registry

        convolve = importlib.import_module(registry.BACKENDS[engine]).convolve
        leaves = [tensor.detach().requires_grad_() for tensor in (features, weight)]

        def forward() -> Any:
            with torch.no_grad():
                return convolve(*leaves, None, self.geometry)

        def both() -> Any:
            out = convolve(*leaves, None, self.geometry)
            return out.detach(), *torch.autograd.grad(out, leaves, cotangent)

        return forward if kind == "forward" else both

    def difference(self, engine: str) -> float:
        """Largest difference of output and gradients to native in float32, as a share of the largest value."""
        if self.exact is None:
            tensors = (tensor.float() for tensor in (self.features, self.weight, self.cotangent))
            with _tf32("native", False):
                self.exact = self._step("native", "both", *tensors)()
        with _tf32(engine, self.tf32):
            found = self.step(engine, "both")()
        pairs = zip(found, self.exact, strict=True)
        return max(float((ours.float() - ref).abs().max() / ref.abs().max()) for ours, ref in pairs)


@contextmanager
def _tf32(engine: str, allowed: bool) -> Iterator[None]:
    """Torch's switch, and the library's own."""
    import torch

    switches = [(torch.backends.cuda.matmul, "allow_tf32")]
    if engine in LIBRARIES:
        switches.append((importlib.import_module(f"{engine}.constants"), "SPCONV_ALLOW_TF32"))
    before = [getattr(owner, name) for owner, name in switches]
    for owner, name in switches:
        setattr(owner, name, allowed)
    try:
        yield
    finally:
        for (owner, name), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _take_turns(problem: Problem, engines: list[str], turns: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a call, engine by engine and step by step."""
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in STEPS} for name in engines}
    calls: dict[tuple[str, str], int] = {}
    start = time.monotonic()
    for turn in range(WARM_UP_TURNS + turns):
        if turn >= WARM_UP_TURNS + FEWEST_TURNS and time.monotonic() - start > SECONDS_OF_A_ROW:
            break
        for kind in STEPS:
            for name in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
                with _tf32(name, problem.tf32):
                    found = _milliseconds(problem.step(name, kind), calls.get((name, kind), 1))
                calls[name, kind] = max(1, min(MOST_CALLS, int(MILLISECONDS_OF_A_TURN / found)))
                if turn >= WARM_UP_TURNS:
                    times[name][kind].append(found)
    return {name: {kind: statistics.median(found) for kind, found in by.items()} for name, by in times.items()}


def _milliseconds(step: Callable[[], Any], calls: int) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _print_tables(rows: list[dict], engines: list[str]) -> None:
    others = [name for name in engines if name != "triton"]
    print("\nforward / forward+backward, ms (median), and the other engine's time over triton's\n")
    names = ["voxels", "pairs per voxel", "channels", "dtype", *engines, *(f"{name} / triton" for name in others)]
    print("|", " | ".join(names), "|")
    print("|" + "---|" * len(names))
    for row in rows:
        times = row["milliseconds"]
        cells = [row["voxels"], f"{row['pairs'] / row['voxels']:.1f}", row["channels"], row["dtype"]]
        cells += [_cell(times.get(name)) for name in engines]
        cells += [_ratio(times.get(name), times.get("triton")) for name in others]
        print("|", " | ".join(map(str, cells)), "|")
    print("\nlargest difference to native in float32, as a share of the largest value")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        found = [row["differences"] for row in rows if row["dtype"] == dtype]
        worst = {name: max(d.get(name, 0.0) for d in found) for name in engines if any(name in d for d in found)}
        print(f"{dtype}: {', '.join(f'{name} {value:.1e}' for name, value in worst.items())}")


def _cell(times: dict[str, float] | None) -> str:
    return "-" if times is None else " / ".join(f"{times[kind]:.3f}" for kind in STEPS)


def _ratio(times: dict[str, float] | None, ours: dict[str, float] | None) -> str:
    return "-" if times is None or ours is None else " / ".join(f"{times[kind] / ours[kind]:.2f}" for kind in STEPS)


if __name__ == "__main__":
    main()

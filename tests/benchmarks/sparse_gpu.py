"""Time of one submanifold convolution on shells on a GPU: triton against spconv, spconv_triton and native.

    python tests/benchmarks/sparse_gpu.py                                  # every case; prints the tables
    python tests/benchmarks/sparse_gpu.py --cases 50k --channels 32 --dtypes bfloat16 --output result.json
    python tests/benchmarks/sparse_gpu.py --toy                            # on the CPU: a check of the script, no times

All engines have the same voxels, features, weights and output gradient in one process, take turns, and their results
are compared with native's before anything is timed. Kernel maps and tables are planned beforehand, and every engine has
run often enough to have chosen its block sizes. Times are medians over the turns, by CUDA events; what counts is the
ratio within one run. An engine that is not usable has its reason printed and no column; one that leaves a dtype to
native has no number there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

SHELLS = {"50k": (128, 1.6), "100k": (192, 1.42), "250k": (256, 1.98), "500k": (384, 1.75), "1M": (512, 1.97)}
"""Name -> extent of the cubic volume, thickness of the ellipsoid shell in voxels."""

TOY = {"toy": (12, 1.5)}
ENGINES = ("native", "triton", "spconv_triton", "spconv")
DTYPES = ("float32", "tf32", "bfloat16", "float16")
STEPS = ("forward", "both")

TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest allowed difference to native in float32, as a share of the largest value."""

WARM_UP_TURNS = 3
CALLS_PER_TURN = 5


def main() -> None:
    """Parse the command line, measure case by case, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(SHELLS), choices=list(SHELLS))
    parser.add_argument("--channels", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--turns", type=int, default=15, help="of every engine, interleaved")
    parser.add_argument("--output", type=Path, help="write everything measured as JSON")
    parser.add_argument("--toy", action="store_true", help="a few voxels on the CPU in Triton's interpreter, no times")
    options = parser.parse_args()
    if options.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not options.toy and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch finds none; --toy checks the script on the CPU.")
    rows = _measure(options, torch.device("cpu" if options.toy else "cuda"))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")
    _print_tables(rows, options.engines)


def _measure(options: argparse.Namespace, device: object) -> list[dict]:
    import torch

    from monai_memeff.sparse import backends

    status = backends.status(device)
    engines = [name for name in options.engines if status[name] is None]
    for name in options.engines:
        if status[name]:
            print(f"# {name} is left out: {status[name]}")
    print(f"# {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    rows = []
    for case, (extent, thickness) in (TOY if options.toy else {c: SHELLS[c] for c in options.cases}).items():
        for channels in options.channels:
            for dtype in options.dtypes:
                problem = Problem(extent, thickness, channels, dtype, device)
                row = {"case": case, "voxels": problem.voxels, "pairs": problem.pairs, "channels": channels}
                row |= {"dtype": dtype, "differences": {}, "milliseconds": {}}
                work = {name: problem for name in engines if _takes(name, dtype)}
                for name in work:
                    row["differences"][name] = problem.difference(name)
                if device.type == "cuda":
                    row["milliseconds"] = _take_turns(problem, list(work), options.turns)
                    print(f"# {case} C{channels} {dtype} done", file=sys.stderr)
                rows.append(row)
    return rows


def _takes(engine: str, dtype: str) -> bool:
    """Whether an engine computes a dtype itself; the two libraries have no bfloat16, and TF32 is their own switch."""
    return dtype in ("float32", "float16") or engine in ("native", "triton")


class Problem:
    """One convolution, the same for every engine."""

    def __init__(self, extent: int, thickness: float, channels: int, dtype: str, device: object) -> None:
        import torch
        from sparse_engines import ellipsoid_shell

        from monai_memeff.sparse.kernel_map import ConvolutionGeometry
        from monai_memeff.sparse.neighbours import KernelShape
        from monai_memeff.sparse.voxel_set import VoxelSet

        torch.manual_seed(0)
        keys = ellipsoid_shell(extent, thickness).flatten().nonzero()[:, 0].to(device)
        voxels = VoxelSet(keys, (extent,) * 3, 1)
        self.geometry = ConvolutionGeometry(voxels, voxels, KernelShape((3, 3, 3), padding=(1, 1, 1)))
        self.voxels, self.pairs = len(voxels), self.geometry.kernel_map.num_pairs
        self.dtype, self.tf32 = getattr(torch, "float32" if dtype == "tf32" else dtype), dtype == "tf32"
        self.name = dtype
        scale = (27 * channels) ** -0.5
        shapes = ((self.voxels, channels, 1.0), (self.voxels, channels, 1.0))
        self.features, self.cotangent = (torch.randn(n, c).mul(s).to(device, self.dtype) for n, c, s in shapes)
        self.weight = torch.randn(27, channels, channels).mul(scale).to(device, self.dtype)

    def step(self, engine: str, kind: str) -> Callable[[], object]:
        """The forward pass without a graph, or forward and backward."""
        import importlib

        import torch

        from monai_memeff.sparse.backends import registry

        convolve = importlib.import_module(registry.BACKENDS[engine]).convolve
        leaves = [self.features.detach().requires_grad_(), self.weight.detach().requires_grad_()]

        def forward() -> object:
            with torch.no_grad():
                return convolve(*leaves, None, self.geometry)

        def both() -> object:
            out = convolve(*leaves, None, self.geometry)
            return out.detach(), *torch.autograd.grad(out, leaves, self.cotangent)

        def with_flag() -> object:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            try:
                return forward() if kind == "forward" else both()
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return with_flag

    def difference(self, engine: str) -> float:
        """Largest difference of output and gradients to native in float32; stops if it is beyond the table."""
        exact = object.__new__(Problem)
        exact.geometry, exact.tf32 = self.geometry, False
        exact.features, exact.cotangent, exact.weight = (
            tensor.float() for tensor in (self.features, self.cotangent, self.weight)
        )
        pairs = zip(self.step(engine, "both")(), exact.step("native", "both")(), strict=True)
        worst = max(float((ours.float() - ref).abs().max() / ref.abs().max()) for ours, ref in pairs)
        if not worst <= TOLERANCES[self.name]:
            sys.exit(f"{engine} and native disagree in {self.name}: {worst:.1e}, allowed {TOLERANCES[self.name]:.0e}.")
        return worst


def _take_turns(problem: Problem, engines: list[str], turns: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a call, engine by engine and step by step."""
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in STEPS} for name in engines}
    for turn in range(WARM_UP_TURNS + turns):
        for kind in STEPS:
            for name in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
                found = _milliseconds(problem.step(name, kind))
                if turn >= WARM_UP_TURNS:
                    times[name][kind].append(found)
    return {name: {kind: statistics.median(found) for kind, found in by.items()} for name, by in times.items()}


def _milliseconds(step: Callable[[], object]) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS_PER_TURN):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS_PER_TURN


def _print_tables(rows: list[dict], engines: list[str]) -> None:
    others = [name for name in engines if name != "triton"]
    print("\nforward / forward+backward, ms (median), and the other engine's time over triton's")
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
        worst = {name: max(d[name] for d in found) for name in engines if all(name in d for d in found)}
        print(f"{dtype}: {', '.join(f'{name} {value:.1e}' for name, value in worst.items())}")


def _cell(times: dict[str, float] | None) -> str:
    return "-" if times is None else " / ".join(f"{times[kind]:.3f}" for kind in STEPS)


def _ratio(times: dict[str, float] | None, ours: dict[str, float] | None) -> str:
    return "-" if times is None or ours is None else " / ".join(f"{times[kind] / ours[kind]:.2f}" for kind in STEPS)


if __name__ == "__main__":
    main()

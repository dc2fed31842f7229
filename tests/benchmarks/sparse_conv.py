"""Time and memory of one submanifold convolution on shells: native against MinkowskiEngine's CPU build and dense.

    python tests/benchmarks/sparse_conv.py                      # every case, prints the tables
    python tests/benchmarks/sparse_conv.py --cases 54k --channels 16 32 --output result.json
    python tests/benchmarks/sparse_conv.py --parity             # the completion network in both engines, weights copied

Every engine has a process of its own, with the same numbers; they take turns, a few steps each, and their results are
compared. The kernel map is planned beforehand. MinkowskiEngine is optional (docs/howto/minkowski.md): without it its
columns stay empty. On a machine that others use too, look at the ratio of CPU times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

SHELLS = {"54k": (128, 1.72), "216k": (256, 1.70), "433k": (256, 3.45)}
"""Name -> extent of the cubic volume, thickness of the ellipsoid shell in voxels."""

STEPS_PER_TURN = 3
"""Steps in a row before the next engine has its turn: the first one meets cold caches."""

GOALS = {"minkowski": 1.6, "dense": 15.0}
MEGABYTE = 1e6


def main() -> None:
    """Parse the command line, run the jobs in fresh processes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(SHELLS), choices=list(SHELLS))
    parser.add_argument("--channels", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="turns of every engine, interleaved")
    parser.add_argument("--engines", nargs="+", default=["native", "minkowski", "dense"])
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--parity", action="store_true", help="compare the completion network with MinkowskiEngine")
    parser.add_argument("--output", type=Path, help="write everything measured as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        _serve(job) if job["kind"] == "work" else print(json.dumps(_run_job(job)))
        return
    engines = [name for name in options.engines if _is_usable(name)]
    report = _in_fresh_process({"kind": "parity"}) if options.parity else _measure(options, engines)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    _print_parity(report["levels"]) if options.parity else _print_tables(report)


def _is_usable(engine: str) -> bool:
    if engine != "minkowski":
        return True
    probe = _in_fresh_process({"kind": "probe"})
    if probe["reason"]:
        print(f"MinkowskiEngine is skipped: {probe['reason']}; see docs/howto/minkowski.md.")
    return not probe["reason"]


def _measure(options: argparse.Namespace, engines: list[str]) -> dict[str, list[dict]]:
    report: dict[str, list[dict]] = {"times": [], "memory": []}
    for case in options.cases:
        names = [name for name in engines if name != "dense" or SHELLS[case][0] <= 128]
        for channels in options.channels:
            job = {"case": case, "channels": channels, "repeats": options.repeats}
            for threads in options.threads:
                result = _time_job({**job, "engines": names, "threads": threads})
                report["times"].append(result)
                _print_progress(result)
            for engine in [] if options.no_memory else names:
                report["memory"].append(_in_fresh_process({**job, "kind": "memory", "engine": engine}))
    return report


def _in_fresh_process(job: dict) -> dict:
    done = subprocess.run(_command(job), env=_environment(1), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _command(job: dict) -> list[str]:
    return [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}


def _run_job(job: dict) -> dict:
    if job["kind"] == "memory":
        return _memory_job(job)
    import minkowski_reference

    if job["kind"] == "probe":
        return {"reason": minkowski_reference.unavailable()}
    return {"levels": minkowski_reference.compare_completion()}


class _Worker:
    """A process that holds one engine and runs it on demand."""

    def __init__(self, job: dict, engine: str) -> None:
        self.engine = engine
        command = _command({**job, "kind": "work", "engine": engine})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=_environment(job["threads"]), **pipes)

    def ask(self, order: str) -> list:
        """Give an order and wait for the answer."""
        print(order, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.engine} stopped at {order!r} with status {self.process.wait()}; see above.")
        return json.loads(answer)


def _time_job(job: dict) -> dict:
    with TemporaryDirectory() as folder:
        workers = [_Worker(job, engine) for engine in job["engines"]]
        voxels = [worker.ask(f"{folder}/{worker.engine}")[0] for worker in workers]
        differences = _differences({name: f"{folder}/{name}" for name in job["engines"]})
    times: dict[str, dict[str, list]] = {name: {"forward": [], "both": []} for name in job["engines"]}
    for _ in range(job["repeats"]):
        for worker in workers:
            for step in ("forward", "both"):
                times[worker.engine][step] += worker.ask(step)
    for worker in workers:
        worker.process.communicate()
    return {**job, "voxels": voxels[0], "milliseconds": times, "differences": differences}


def _serve(job: dict) -> None:
    """Be a worker: answer every order from standard input with one line of JSON."""
    import torch
    from sparse_engines import prepare_case

    torch.set_num_threads(job["threads"])
    engine = prepare_case(*SHELLS[job["case"]], job["channels"], [job["engine"]])[job["engine"]]
    for line in sys.stdin:
        order = line.strip()
        if order in ("forward", "both"):
            step = engine.forward if order == "forward" else engine.forward_and_backward
            answer = [_milliseconds(step) for _ in range(1 if job["engine"] == "dense" else STEPS_PER_TURN)]
        else:
            results = engine.results()
            torch.save(results, order)
            answer = [len(results[0])]
        print(json.dumps(answer), flush=True)


def _milliseconds(step: Callable[[], object]) -> list[float]:
    """Wall time and CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return [1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)]


def _differences(files: dict[str, str]) -> dict[str, float]:
    """Largest difference to native over output, input gradient and weight gradient, relative to the largest value."""
    import torch

    differences = {}
    reference = torch.load(files["native"])
    for name, file in files.items():
        pairs = zip(torch.load(file), reference, strict=True)
        differences[name] = max(float((mine - native).abs().max() / native.abs().max()) for mine, native in pairs)
        if differences[name] > 1e-4:
            sys.exit(f"{name} and native disagree: relative difference {differences[name]:.2e}, allowed 1e-4.")
    return differences


def _memory_job(job: dict) -> dict:
    from process_memory import peak_resident_bytes
    from sparse_engines import prepare_case

    from monai_memeff.memory import measure_peak

    prepare_case(16, 2.0, job["channels"], [job["engine"]])[job["engine"]].forward_and_backward()  # load libraries
    engine = prepare_case(*SHELLS[job["case"]], job["channels"], [job["engine"]])[job["engine"]]
    resident = peak_resident_bytes(engine.forward_and_backward)  # the first step: the kernel map is planned in it
    with measure_peak() as meter:
        engine.forward_and_backward()
    return {**job, "resident_bytes": resident, "tensor_bytes": meter.peak_bytes, "input_bytes": engine.input_bytes}


def _print_progress(result: dict) -> None:
    parts = [f"{name} {_best(t['both']):.0f} ms" for name, t in result["milliseconds"].items()]
    print(f"# {result['case']} C{result['channels']} {result['threads']} threads: {', '.join(parts)}", file=sys.stderr)


def _best(times: list[list[float]], clock: int = 0) -> float:
    return min(pair[clock] for pair in times)


def _print_tables(report: dict) -> None:
    print(
        "\nforward / forward+backward, ms: minimum (median of forward+backward); the kernel map is planned beforehand"
    )
    print(
        "| voxels | channels | threads | native | MinkowskiEngine | dense | ME / native | CPU times | dense / native |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in report["times"]:
        times = row["milliseconds"]
        cells = [_time_cell(times.get(name)) for name in ("native", "minkowski", "dense")]
        ratios = [_ratio_cell(times, "minkowski"), _ratio_cell(times, "minkowski", 1), _ratio_cell(times, "dense")]
        print("|", " | ".join(map(str, [row["voxels"], row["channels"], row["threads"], *cells, *ratios])), "|")
    largest = max(max(row["differences"].values()) for row in report["times"])
    print(f"largest relative difference of outputs and gradients: {largest:.0e}; goals: {GOALS}")
    _print_best_settings(report["times"])
    if report["memory"]:
        _print_memory(report["memory"])


def _time_cell(times: dict | None) -> str:
    if times is None:
        return "-"
    median = statistics.median(pair[0] for pair in times["both"])
    return f"{_best(times['forward']):.0f} / {_best(times['both']):.0f} ({median:.0f})"


def _ratio_cell(times: dict, other: str, clock: int = 0) -> str:
    if other not in times:
        return "-"
    forward, both = (
        _best(times[other][step], clock) / _best(times["native"][step], clock) for step in ("forward", "both")
    )
    return f"{forward:.1f} / {both:.2f}" + ("" if both >= GOALS[other] else " (goal missed)")


def _print_best_settings(rows: list[dict]) -> None:
    """Every engine at the thread count that suits it best."""
    print("\nforward+backward, each engine at its better thread count (ms, threads)")
    print("| voxels | channels | native | MinkowskiEngine | ME / native |")
    print("|---|---|---|---|---|")
    for voxels, channels in dict.fromkeys((row["voxels"], row["channels"]) for row in rows):
        same = [row for row in rows if (row["voxels"], row["channels"]) == (voxels, channels)]
        best = {
            name: min((_best(row["milliseconds"][name]["both"]), row["threads"]) for row in same)
            for name in ("native", "minkowski")
            if name in same[0]["milliseconds"]
        }
        cells = [f"{best[n][0]:.0f}, {best[n][1]}" if n in best else "-" for n in ("native", "minkowski")]
        ratio = f"{best['minkowski'][0] / best['native'][0]:.2f}" if len(best) == 2 else "-"
        print(f"| {voxels} | {channels} | {cells[0]} | {cells[1]} | {ratio} |")


def _print_memory(rows: list[dict]) -> None:
    print("\npeak memory of forward+backward above the inputs, MB, 1 thread, a fresh process per engine")
    print(
        "| case | channels | engine | input and weights | live tensors, map kept | resident set, first step with map |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row[key] / MEGABYTE:.1f}" for key in ("input_bytes", "tensor_bytes", "resident_bytes")]
        print(f"| {row['case']} | {row['channels']} | {row['engine']} | {' | '.join(cells)} |")


def _print_parity(rows: list[dict]) -> None:
    print("| mode | stride | candidates | same candidates | largest logit | largest difference |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['mode']} | {row['stride']} | {row['candidates']} | {'yes' if row['same_candidates'] else 'NO'} "
            f"| {row['largest']:.3f} | {row['difference']:.1e} |"
        )
    if not all(row["same_candidates"] and row["difference"] <= 1e-4 * max(row["largest"], 1) for row in rows):
        sys.exit("the two engines disagree.")


if __name__ == "__main__":
    main()

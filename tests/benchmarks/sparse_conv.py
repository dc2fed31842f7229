"""Time and memory of one submanifold convolution on shells: native against MinkowskiEngine's CPU build and dense.

    python tests/benchmarks/sparse_conv.py                      # every case, prints a table
    python tests/benchmarks/sparse_conv.py --cases 54k --channels 16 32 --output result.json
    python tests/benchmarks/sparse_conv.py --parity             # the completion network in both engines, weights copied

All engines of a case run in one process, repeats interleaved, on the same numbers, and their results are compared; the
kernel map is planned beforehand. Memory is taken in a fresh process per engine. MinkowskiEngine is optional
(docs/howto/minkowski.md): without it its columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHELLS = {"54k": (128, 1.72), "216k": (256, 1.70), "433k": (256, 3.45)}
"""Name -> extent of the cubic volume, thickness of the ellipsoid shell in voxels."""

GOALS = {"minkowski": 1.6, "dense": 15.0}
MEGABYTE = 1e6


def main() -> None:
    """Parse the command line, run the jobs in fresh processes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(SHELLS), choices=list(SHELLS))
    parser.add_argument("--channels", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7, help="per engine, interleaved")
    parser.add_argument("--engines", nargs="+", default=["native", "minkowski", "dense"])
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--parity", action="store_true", help="compare the completion network with MinkowskiEngine")
    parser.add_argument("--output", type=Path, help="write everything measured as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(_run_job(json.loads(options.job))))
        return
    engines = [name for name in options.engines if _is_usable(name)]
    report = {"parity": _in_fresh_process({"kind": "parity"}, 1)} if options.parity else _measure(options, engines)
    _print_parity(report["parity"]) if options.parity else _print_tables(report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def _is_usable(engine: str) -> bool:
    if engine != "minkowski":
        return True
    probe = _in_fresh_process({"kind": "probe"}, 1)
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
                result = _in_fresh_process({**job, "kind": "time", "engines": names, "threads": threads}, threads)
                report["times"].append(result)
                _print_progress(result)
            for engine in [] if options.no_memory else names:
                report["memory"].append(_in_fresh_process({**job, "kind": "memory", "engine": engine}, 1))
    return report


def _in_fresh_process(job: dict, threads: int) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_job(job: dict) -> dict:
    if job["kind"] == "probe":
        import minkowski_reference

        return {"reason": minkowski_reference.unavailable()}
    if job["kind"] == "parity":
        import minkowski_reference

        return minkowski_reference.compare_completion()
    return _time_job(job) if job["kind"] == "time" else _memory_job(job)


def _time_job(job: dict) -> dict:
    import torch
    from sparse_engines import prepare_case

    torch.set_num_threads(job["threads"])
    engines = prepare_case(*SHELLS[job["case"]], job["channels"], job["engines"])
    results = {name: engine.results() for name, engine in engines.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in engines}
    for _ in range(job["repeats"]):
        for name, engine in engines.items():
            times[name]["forward"].append(_milliseconds(engine.forward))
            times[name]["both"].append(_milliseconds(engine.forward_and_backward))
    voxels = len(next(iter(results.values()))[0])
    return {**job, "voxels": voxels, "milliseconds": times, "differences": _differences(results)}


def _milliseconds(step: object) -> float:
    start = time.perf_counter()
    step()  # type: ignore[operator]
    return 1e3 * (time.perf_counter() - start)


def _differences(results: dict) -> dict[str, float]:
    """Largest difference to native over output, input gradient and weight gradient, relative to the largest value."""
    differences = {}
    for name, arrays in results.items():
        pairs = zip(arrays, results["native"], strict=True)
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
    parts = [f"{name} {min(t['both']):.0f} ms" for name, t in result["milliseconds"].items()]
    print(f"# {result['case']} C{result['channels']} {result['threads']} threads: {', '.join(parts)}", file=sys.stderr)


def _print_tables(report: dict) -> None:
    print("\nforward / forward+backward in ms, minimum (median of forward+backward); kernel map planned beforehand")
    print("| case | channels | threads | native | MinkowskiEngine | dense | ME / native | dense / native | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in report["times"]:
        times = row["milliseconds"]
        cells = [_time_cell(times.get(name)) for name in ("native", "minkowski", "dense")]
        ratios = [_ratio_cell(times, name) for name in GOALS]
        difference = max(row["differences"].values())
        cells = [f"{row['voxels']} ({row['case']})", row["channels"], row["threads"], *cells, *ratios, f"{difference:.0e}"]
        print("|", " | ".join(map(str, cells)), "|")
    _print_best_settings(report["times"])
    if report["memory"]:
        _print_memory(report["memory"])


def _time_cell(times: dict | None) -> str:
    if times is None:
        return "-"
    return f"{min(times['forward']):.0f} / {min(times['both']):.0f} ({statistics.median(times['both']):.0f})"


def _ratio_cell(times: dict, other: str) -> str:
    if other not in times or "native" not in times:
        return "-"
    forward, both = (min(times[other][step]) / min(times["native"][step]) for step in ("forward", "both"))
    return f"{forward:.1f} / {both:.2f}" + ("" if both >= GOALS[other] else " (goal missed)")


def _print_best_settings(rows: list[dict]) -> None:
    """Every engine at the thread count that suits it best."""
    print("\nforward+backward, each engine at its better thread count (ms, threads)")
    print("| case | channels | native | MinkowskiEngine | ME / native |")
    print("|---|---|---|---|---|")
    for case, channels in dict.fromkeys((row["case"], row["channels"]) for row in rows):
        same = [row for row in rows if (row["case"], row["channels"]) == (case, channels)]
        best = {
            name: min((min(row["milliseconds"][name]["both"]), row["threads"]) for row in same)
            for name in ("native", "minkowski")
            if name in same[0]["milliseconds"]
        }
        cells = [f"{best[n][0]:.0f}, {best[n][1]}" if n in best else "-" for n in ("native", "minkowski")]
        ratio = f"{best['minkowski'][0] / best['native'][0]:.2f}" if len(best) == 2 else "-"
        print(f"| {case} | {channels} | {cells[0]} | {cells[1]} | {ratio} |")


def _print_memory(rows: list[dict]) -> None:
    print("\npeak memory of forward+backward above the inputs, MB, 1 thread, a fresh process per engine")
    print("| case | channels | engine | input and weights | live tensors, map kept | resident set, first step with map |")
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

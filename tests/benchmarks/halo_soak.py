"""Starts a short job over gloo again and again under load and keeps the log of every launch that fails.

    python tests/benchmarks/halo_soak.py --launches 200 [--processes 2] [--busy 2] [--ways file torchrun] [--fork]

Each launch starts new processes that partition a small network, take two training steps, compare the result with the
whole volume and leave. Ways to meet: "file" (a file that all processes know), "torchrun" (`torchrun --standalone`,
which takes a free port), "port" (MASTER_ADDR and one fixed MASTER_PORT, as scripts without torchrun do). `--leave exit`
ends the processes without `destroy_mesh()`. `--busy` idle-looping processes make the machine late on purpose. `--fork`
splits the processes off one that has imported torch and this package, which leaves out ten seconds of importing and
nothing else; torchrun always starts new ones.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPIN = "while True: pass"


def job(leave: str) -> None:
    """What every process does: two steps in parts, and one check against the whole."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from monai_memeff.halo import destroy_mesh, init_from_torchrun, init_mesh, parallelize, scatter

    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    if "MEMEFF_STORE" in os.environ:
        where, rank = f"file://{os.environ['MEMEFF_STORE']}", int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
        mesh = init_mesh(spatial=(world,))
    else:
        mesh = init_from_torchrun(1, (world,))
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.Conv3d(4, 1, 3, padding=1)).double()
    parts = parallelize(copy.deepcopy(whole), mesh)
    x = torch.randn(1, 1, 4 * world, 6, 6, dtype=torch.float64)
    for network, part, factor in ((whole, x, 1.0), (parts, scatter(x, mesh), world)):
        optimizer = torch.optim.SGD(network.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            (network(part).square().sum() * factor).backward()
            optimizer.step()
    worst = max(
        float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)
    )
    assert worst < 1e-10, f"the parameters differ by {worst}"
    if leave == "close":
        destroy_mesh()
    print(f"done {mesh.comm.rank}", flush=True)


class Forked:
    """A copy of this process that runs the job and leaves like any other Python process."""

    def __init__(self, leave: str, env: dict[str, str], log: Path) -> None:
        self._pid = os.fork()
        if self._pid:
            return
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(env)
        job(leave)
        sys.exit()  # nothing above may clean up on the way out: this is a copy

    def wait(self, timeout: float) -> int:
        """Exit code; raises like `Popen.wait`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        raise subprocess.TimeoutExpired("fork", timeout)

    def kill(self) -> None:
        """End it at once."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


Process = subprocess.Popen[bytes] | Forked


def start(way: str, options: argparse.Namespace, store: Path, log: Path) -> list[Process]:
    """Start one launch; one process per rank, or torchrun alone."""
    world, leave = options.processes, options.leave
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MEMEFF_STORE")}
    base |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    run = [__file__, "--job", "--leave", leave]
    output = log.open("wb")
    if way == "torchrun":
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        return [subprocess.Popen([sys.executable, *agent, *run], env=base, stdout=output, stderr=output)]
    meet = {"MEMEFF_STORE": str(store)}
    if way == "port":
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    ranks = [meet | {"RANK": str(r), "WORLD_SIZE": str(world), "LOCAL_RANK": str(r)} for r in range(world)]
    if options.fork:
        return [Forked(leave, env, log) for env in ranks]
    return [subprocess.Popen([sys.executable, *run], env=base | env, stdout=output, stderr=output) for env in ranks]


def outcome(processes: list[Process], log: Path, world: int, limit: float) -> str:
    """The word ok, or what went wrong in one line."""
    deadline = time.monotonic() + limit
    try:
        codes = [p.wait(max(deadline - time.monotonic(), 0.1)) for p in processes]
    except subprocess.TimeoutExpired:
        for p in processes:
            p.kill()
        return f"no end after {limit:.0f} s"
    done = log.read_text(errors="replace").count("done ")
    if any(codes):
        return f"exit codes {codes}, {done} of {world} had finished"
    return "ok" if done == world else f"only {done} of {world} finished"


def main() -> None:
    """Launch, count, and print one line per failure and one per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1, help="processes that only burn time")
    parser.add_argument("--ways", nargs="+", default=["file", "torchrun"], choices=["file", "torchrun", "port"])
    parser.add_argument("--leave", choices=["close", "exit"], default="close")
    parser.add_argument("--fork", action="store_true", help="split off a process that has imported everything")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a launch counts as hung")
    parser.add_argument("--logs", type=Path, default=None, help="folder for logs of failures; by default a new one")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options.leave)
        return
    if options.fork:
        import torch._dynamo  # noqa: F401  what the first step imports

        import monai_memeff.halo  # noqa: F401

        gc.freeze()
    logs = options.logs or Path(tempfile.mkdtemp(prefix="halo_soak_"))
    logs.mkdir(parents=True, exist_ok=True)
    busy = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(options.busy)]
    counts: Counter[tuple[str, bool]] = Counter()
    seconds: list[float] = []
    for number in range(options.launches):
        way, log, store = options.ways[number % len(options.ways)], logs / f"{number}.log", logs / f"{number}.store"
        began = time.monotonic()
        result = outcome(start(way, options, store, log), log, options.processes, options.limit)
        seconds.append(time.monotonic() - began)
        counts[way, result == "ok"] += 1
        store.unlink(missing_ok=True)
        if result == "ok":
            log.unlink()
        else:
            print(f"launch {number} ({way}): {result}; {log}", flush=True)
    for process in busy:
        process.kill()
    for way in sorted(set(options.ways)):
        print(f"{way}: {counts[way, True]} launches ended well, {counts[way, False]} did not")
    print(f"{options.processes} processes each, {options.busy} busy ones beside, load {os.getloadavg()[2]:.0f}")
    print(f"median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s")


if __name__ == "__main__":
    main()

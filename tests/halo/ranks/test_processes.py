"""The same plan over real processes (gloo): networks, training, two nodes, refusals, a killed rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def launch(world: int, *command: str, store: Path) -> list[subprocess.Popen[str]]:
    """Start one process per rank, joined by a file instead of a port."""
    processes = []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MEMEFF_STORE": str(store),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, *command], env=env, text=True, cwd=ROOT, **pipes))
    return processes


@pytest.mark.exhaustive
@pytest.mark.parametrize(("task", "world", "checks"), [("two", 2, 9), ("four", 4, 24)])
def test_processes_equal_the_whole(task: str, world: int, checks: int, tmp_path: Path) -> None:
    processes = launch(world, "-W", "ignore", "-m", "tests.halo.ranks.worker", task, store=tmp_path / "store")
    check(processes, checks)


def check(processes: list[subprocess.Popen[str]], checks: int) -> None:
    """All ended well and one of them reported so many checks, each with an error below 1e-10."""
    outputs = [p.communicate(timeout=300) for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(err[-1500:] for _, err in outputs)
    results = [json.loads(line) for out, _ in outputs for line in out.splitlines() if line.startswith("{")]
    assert len(results) == checks
    assert not [r for r in results if not abs(r["value"]) < 1e-10]


@pytest.mark.exhaustive
def test_two_torchrun_agents_equal_one_process(tmp_path: Path) -> None:
    """Two nodes on one host: data x spatial 2 x 2, an agent with two processes each, meeting over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = "127.0.0.1:{1}".format(*free.getsockname())
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "halo", "--local_addr", "127.0.0.1"]
    command = ["-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2", *meet]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MEMEFF_STORE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    agents = [
        subprocess.Popen(
            [sys.executable, *command, "-m", "tests.halo.ranks.worker", "nodes"], env=env, text=True, cwd=ROOT, **pipes
        )
        for _ in range(2)
    ]
    try:
        check(agents, 7)
    finally:
        for agent in agents:
            agent.terminate()  # it ends its processes


FOREVER = """
import sys, time, torch, torch.distributed as dist, os
from torch import nn
dist.init_process_group("gloo", init_method="file://" + os.environ["MEMEFF_STORE"],
                        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
from monai_memeff.halo import init_mesh, scatter, spatial_partition
mesh = init_mesh(spatial=(3,))
net = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.InstanceNorm3d(2), nn.Conv3d(2, 1, 3, padding=1))
net = spatial_partition(net, mesh)
x = scatter(torch.randn(1, 1, 12, 8, 8), mesh)
for step in range(10**9):
    net(x).sum().backward()
    if step == 3:
        print("running", flush=True)
"""


@pytest.mark.long
def test_a_killed_rank_ends_all_others_with_a_clear_error(tmp_path: Path) -> None:
    processes = launch(3, "-c", FOREVER, store=tmp_path / "store")
    try:
        assert all(p.stdout is not None and p.stdout.readline() == "running\n" for p in processes)
        processes[2].send_signal(signal.SIGKILL)
        start = time.monotonic()
        errors = [p.communicate(timeout=60)[1] for p in processes[:2]]
        assert time.monotonic() - start < 60
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode != 0 for p in processes)
    assert all("PeerLostError" in e and "a process ended, hung past the timeout" in e for e in errors), errors

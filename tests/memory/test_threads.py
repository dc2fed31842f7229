"""Networks looked at on tensors without memory in several threads: in threads that end, and at once."""

from __future__ import annotations

import copy
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import monai_memeff
from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.memory import estimate_network
from monai_memeff.memory.dry import dry_run
from monai_memeff.memory.untouched import home
from tests.processes import run_module

FOLDER = Path(monai_memeff.__file__).parent

THREADS = """
import os
import sys
import threading

import torch
from torch import nn

from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.memory import estimate_network


def stream(channels):
    network = nn.Sequential(nn.Conv3d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv3d(channels, 1, 1)).eval()
    volume = torch.randn(1, 1, 6, 5, 4)
    torch.testing.assert_close(SpatialPartitionInferer(partitions=2)(volume, network), network(volume))


def estimate(channels):
    assert estimate_network(nn.Conv3d(1, channels, 3), (1, 1, 6, 5, 4)).peak_bytes > 0


def in_threads(*calls):
    threads = [threading.Thread(target=call, args=(2 + i,)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def in_a_child(call):
    child = os.fork()
    if not child:
        call(5)
        in_threads(call)
        call(6)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, second = globals()[sys.argv[1]], globals()[sys.argv[2]]
    in_threads(first)
    in_threads(second)
    in_a_child(first)
    second(7)
    print("ended well")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("stream", "estimate"), ("estimate", "stream")])
def test_threads_that_end(first: str, second: str, tmp_path: Path) -> None:
    (tmp_path / "in_threads.py").write_text(THREADS)
    variables = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = run_module("in_threads", first, second, folder=tmp_path, variables=variables)
    assert (done.returncode, done.stdout) == (0, "ended well\n"), done.stderr


def test_every_mode_of_the_package_is_such_a_mode() -> None:
    own = [p for p in FOLDER.rglob("*.py") if "FakeTensorMode" in p.read_text("utf-8")]
    assert own == [FOLDER / "memory" / "threads.py"]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_threads_at_once(shared: bool) -> None:
    own = [nn.Sequential(nn.Conv3d(1, 2 + i, 3, padding=1), nn.InstanceNorm3d(2 + i)).double() for i in range(3)]
    expected, inferer = copy.deepcopy(own), SpatialPartitionInferer(partitions=2)

    def run(i: int) -> None:
        which, volume = 0 if shared else i, torch.randn(1, 1, 5 + i, 4, 3, dtype=torch.float64)
        found = (inferer if shared else SpatialPartitionInferer(partitions=2))(volume, own[which])
        torch.testing.assert_close(found, expected[which](volume).detach())
        assert estimate_network(own[which], volume.shape).peak_bytes >= found.nbytes

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # else a thread may be done before the next one starts
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(run, range(3)))
    finally:
        sys.setswitchinterval(interval)


def test_the_network_of_a_dry_run_is_read_when_it_is_back() -> None:
    order: list[str] = []

    class Looked(nn.Conv3d):
        def forward(self, volume: torch.Tensor) -> torch.Tensor:
            reader.start()
            reader.join(0.2)
            order.append("ran")
            return super().forward(volume)

    def read() -> None:
        order.append(str(home(network)))

    network, reader = Looked(1, 2, 3), threading.Thread(target=read)
    dry_run(network, (1, 1, 5, 4, 3), torch.float32, network, training=False)
    reader.join()
    assert order == ["ran", "cpu"]

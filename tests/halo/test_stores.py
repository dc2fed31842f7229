"""Stores that fail well: a full disk is an error of one line, and a killed run leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from monai_memeff.halo import SpatialPartitionInferer, plan
from monai_memeff.halo.run import pinned, stores
from tests.halo.kinds import small_conv
from tests.halo.partitioned import difference, plain

Usage = namedtuple("Usage", "total used free")


def net() -> nn.Module:
    """Two convolutions, so that something is stored in between."""
    return nn.Sequential(small_conv(3), nn.ReLU(), small_conv(3))


def check(error: BaseException, folder: Path) -> None:
    """One line that names the folder, the need and what is left, and an empty folder."""
    assert "\n" not in str(error)
    assert str(folder) in str(error)
    assert "choose another folder" in str(error)
    assert not list(folder.iterdir())


def test_a_full_disk_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, inferer = net(), torch.randn(1, 2, 24, 16, 16), SpatialPartitionInferer(3, store=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(OSError, match="has 1000 left") as full:
            inferer(x, network)
    check(full.value, tmp_path)
    assert difference(inferer(x, network), plain(network, (x,))) < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes")
@pytest.mark.slow
def test_a_disk_that_fills_up_during_the_run_is_an_error(tmp_path: Path) -> None:
    """The system itself refuses the blocks of a file, as on a full disk."""
    network, x, inferer = net(), torch.randn(1, 2, 24, 16, 16), SpatialPartitionInferer(3, store=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (x.nbytes - 1, hard))
    try:
        with pytest.raises(OSError, match=f"The store needs {x.nbytes} bytes") as full:
            inferer(x, network)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(full.value, tmp_path)
    assert difference(inferer(x, network), plain(network, (x,))) < 1e-5


def test_blocks_are_written_where_they_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with open(tmp_path / "file", "w+b") as file:
        stores._reserve_blocks(file.fileno(), 3 * 2**20 + 5)
        found = os.fstat(file.fileno())
    assert found.st_size == 3 * 2**20 + 5
    assert found.st_blocks * 512 >= found.st_size


def test_too_little_host_memory_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="1000 are free; give store= a folder") as full:
        SpatialPartitionInferer(3)(torch.randn(1, 2, 24, 16, 16), net())
    assert "\n" not in str(full.value)


FOREVER = """
import sys, torch
from torch import nn
from monai_memeff.halo import SpatialPartitionInferer, plan
network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 1, 3, padding=1))
while True:
    SpatialPartitionInferer(8, store=sys.argv[1])(torch.randn(1, 1, 64, 64, 64), network)
"""


def mapped(process: int, folder: Path) -> int:
    """Number of files of the folder that a process has mapped."""
    return sum(str(folder) in line for line in Path(f"/proc/{process}/maps").read_text().splitlines())


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_file(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", FOREVER, str(tmp_path)])
    try:
        for _ in range(3000):
            assert process.poll() is None
            process.send_signal(signal.SIGSTOP)  # so that it has them mapped when it is killed, not a moment before
            if mapped(process.pid, tmp_path):
                break
            process.send_signal(signal.SIGCONT)
            time.sleep(0.1)
        else:
            pytest.fail("the run maps no file of its store's folder")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(tmp_path.iterdir())
    network, x = net(), torch.randn(1, 2, 24, 16, 16)
    assert difference(SpatialPartitionInferer(3, store=tmp_path)(x, network), plain(network, (x,))) < 1e-5


def is_mapped(address: int) -> bool:
    """Whether this process has memory at an address; yes where the system does not say."""
    maps = Path("/proc/self/maps")
    ranges = (line.split()[0].split("-") for line in maps.read_text().splitlines()) if maps.exists() else ()
    return not maps.exists() or any(int(lo, 16) <= address < int(hi, 16) for lo, hi in ranges)


class Locks:
    """CUDA's runtime as far as it locks memory."""

    def __init__(self, works: bool) -> None:
        self.status, self.held = 0 if works else 2, dict[int, int]()

    def cudaHostRegister(self, address: int, nbytes: int, _: int) -> int:  # noqa: N802 CUDA's name
        """Lock."""
        if self.status == 0:
            self.held[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802 CUDA's name
        """Unlock; fails for what is not locked, or is not there any more."""
        assert is_mapped(address)
        del self.held[address]


@pytest.fixture
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Locks:
    found = Locks(request.param)
    monkeypatch.setattr(pinned, "_runtime", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return found


@pytest.mark.parametrize("locks", [True, False], indirect=True)
def test_locked_memory_is_used_again_when_no_view_of_it_is_left(locks: Locks) -> None:
    store = stores.HostStore(torch.device("cuda"))
    store.reserve(1000)
    first = store.allocate((2, 50), torch.float32)
    row, address = first[1], first.data_ptr()
    del first
    second = store.allocate((100,), torch.float32)
    assert second.data_ptr() != address  # a row of the first is in use
    del row
    third = store.allocate((50, 4), torch.float16)
    assert third.data_ptr() == address
    assert locks.held == ({address: 400, second.data_ptr(): 400} if locks.status == 0 else {})
    del second
    fourth = store.allocate((300,), torch.bfloat16)  # more than 1000 bytes with the block that nobody uses
    assert locks.held == ({address: 400, fourth.data_ptr(): 600} if locks.status == 0 else {})
    assert store.allocate((3, 0), torch.bfloat16).shape == (3, 0)
    del store, third
    assert list(locks.held.values()) == ([600] if locks.status == 0 else [])
    fourth.fill_(1)
    del fourth
    assert not locks.held


def test_a_plan_for_a_gpu_counts_the_workspace_of_convolutions() -> None:
    network = nn.Conv3d(2, 3, 3, padding=1)
    here, there = (plan(network, (1, 2, 8, 8, 8), device=device).peak_bytes for device in ("meta", "cuda"))
    x, y = 2 * 8**3 * 4, 3 * 8**3 * 4
    assert (here, there) == (x + y, 2 * (x + y))

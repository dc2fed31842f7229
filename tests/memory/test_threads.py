"""Networks looked at on tensors without memory in several threads: in threads that end, at once, and while in use."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import monai_memeff
from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer, plan
from monai_memeff.halo.inferer import whole_peak_bytes
from monai_memeff.halo.planning.capture import capture
from monai_memeff.halo.planning.estimate import dry
from monai_memeff.halo.planning.rules.windowed.kernels import DRY
from monai_memeff.memory import estimate_network
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


class Met(nn.Module):
    """Does something in another thread in the middle of a call."""

    def __init__(self, momentum: float | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2, momentum=momentum)
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.meanwhile = SimpleNamespace(works=list[Callable[[], object]]())  # not a list: a look puts those back

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        first = self.conv(volume)
        if self.meanwhile.works:
            in_another_thread(self.meanwhile.works.pop())
        return self.norm(first) * self.factor


def in_another_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


SHAPE = (1, 1, 5, 4, 3)
LOOKS: dict[str, Callable[[nn.Module], object]] = {
    "dry run": lambda network: estimate_network(network, SHAPE),
    "dry run of a step": lambda network: estimate_network(network, SHAPE, training=True),
    "plan": lambda network: plan(network, SHAPE, partitions=2),
    "capture with gradients": lambda network: capture(network, (torch.empty(SHAPE, device="meta"),)),
    "peak": lambda network: whole_peak_bytes(network, SHAPE, torch.float32),
}


def step(network: nn.Module) -> torch.Tensor:
    """What a server and a trainer do; the sum of what comes out."""
    volume = torch.linspace(-1, 2, 60).view(SHAPE)
    with torch.no_grad():
        plain = network(volume)
    loss = network(volume).square().sum()
    loss.backward()
    torch.optim.Adam(network.parameters()).step()
    return plain.sum() + loss.detach()


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_another_thread_uses_a_network_that_is_looked_at(look: Callable[[nn.Module], object]) -> None:
    network = Met(None if look in (LOOKS["plan"], LOOKS["capture with gradients"]) else 0.1)
    twin, found = copy.deepcopy(network), list[object]()
    network.meanwhile.works.append(lambda: found.extend([home(network), step(network)]))
    look(network)
    expected = step(twin)
    assert str(found[0]) == "cpu"
    torch.testing.assert_close(found[1], expected, rtol=0, atol=0)
    assert type(network._buffers) is type(network._parameters) is dict
    states = [[*n.state_dict().values(), *(p.grad for p in n.parameters())] for n in (network, twin)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_another_thread_uses_what_is_compiled() -> None:
    network, called = Met(), list[int]()
    plain = network.conv._call_impl

    def compiled(volume: torch.Tensor) -> torch.Tensor:
        called.append(threading.get_ident())
        return plain(volume)

    network.conv._compiled_call_impl = compiled
    network.meanwhile.works.append(lambda: network.conv(torch.zeros(SHAPE)))
    plan(network, SHAPE)
    assert [thread == threading.get_ident() for thread in called] == [False]
    assert network.conv._compiled_call_impl is compiled


def test_another_thread_is_told_nothing_of_a_capture() -> None:
    network, found = Met(), list[object]()

    def work() -> None:
        found.append(torch.compiler.is_compiling())
        warnings.warn("of another thread", UserWarning, stacklevel=1)
        random.random(), np.random.rand()
        print("said", file=sys.stderr)
        filters.__enter__()

    network.meanwhile.works.append(work)
    filters, said = warnings.catch_warnings(), io.StringIO()
    with contextlib.redirect_stderr(said), pytest.warns(UserWarning, match="of another thread"):
        plan(network, SHAPE)  # is not refused for the numbers that another thread draws
    assert (found, said.getvalue()) == ([False], "said\n")
    filters.__exit__(None, None, None)  # filters of the time of the capture come back
    with pytest.warns(UserWarning, match="of this one"):
        warnings.warn("of this one", UserWarning, stacklevel=1)


def test_threads_that_draw_all_the_while_are_named() -> None:
    network = Met()
    network.meanwhile.works += [random.random] * 9
    with pytest.raises(NotPartitionableError, match=r"numpy.random in forward.*eval\(\)"):
        plan(network, SHAPE)
    assert len(network.meanwhile.works) in (6, 8)  # three tries where more than one thread lives


def test_a_dry_run_of_another_device_is_of_its_thread() -> None:
    with dry(torch.device("cuda")):
        assert (DRY.kind, in_another_thread(lambda: DRY.kind)) == ("cuda", None)

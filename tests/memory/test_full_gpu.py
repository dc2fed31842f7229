"""A device that is full: the inferers go on in smaller parts with the same result, or refuse in words with bytes."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from monai.inferers import Inferer
from monai.networks.nets import UNet
from torch import Tensor, nn

from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.errors import InputError
from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.memory.tracker import StorageTracker, Watcher
from monai_memeff.occupancy import OccupancyNet, OctreeInferer
from monai_memeff.sparse import SparseInferer, SparseUNet
from tests.oracles import asymmetric, fill_asymmetric

GPU = torch.device("cuda", 0)
SEGMENT = 20 * 2**20
"""What torch's allocator takes of a GPU at a time."""


class Case(NamedTuple):
    """An inferer and its network.

    Attributes:
        large: shape whose one pass takes hundreds of MiB, far more than the allocator's smallest segments.
        small: shape that is enough for a bound on the host.
        active: how many of the voxels are not 0.
        smallest: the inferer with its smallest parts, where these take about half of its memory or more; itself where
            most of that is not the work on a part.
    """

    inferer: Inferer
    network: Callable[[], nn.Module]
    large: tuple[int, ...]
    small: tuple[int, ...]
    active: float = 1.0
    smallest: Inferer | None = None

    def volume(self, shape: tuple[int, ...]) -> Tensor:
        """Volumes without symmetry."""
        return asymmetric(shape) * (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < self.active)


CASES = {
    "slabs": Case(
        SlabInferer(slab=40),
        lambda: CLSTMUNet(channels=(8, 16), hidden_channels=4, out_channels=3),
        (1, 1, 384, 352, 40),
        (1, 1, 16, 12, 20),
        smallest=SlabInferer(slab=40),  # a slab and its result wait on the device
    ),
    "octree": Case(
        OctreeInferer(points_per_pass=2**18, stride=1),
        lambda: OccupancyNet(1, 3, channels=(4, 8)),
        (1, 1, 64, 60, 56),
        (1, 1, 8, 7, 6),
    ),
    "slabs in a budget that is not there": Case(
        SlabInferer(slab=40, memory_budget=2**40),
        lambda: CLSTMUNet(channels=(8, 16), hidden_channels=4, out_channels=3),
        (1, 1, 384, 352, 40),
        (1, 1, 16, 12, 20),
        smallest=SlabInferer(slab=1),
    ),
    "octree in a budget that is not there": Case(
        OctreeInferer(points_per_pass=2**18, stride=1, memory_budget=2**40),
        lambda: OccupancyNet(1, 3, channels=(4, 8)),
        (1, 1, 64, 60, 56),
        (1, 1, 8, 7, 6),
    ),
    "sparse": Case(
        SparseInferer(),
        lambda: SparseUNet(3, 1, 2, channels=(8, 16), strides=(2,), num_res_units=1),
        (6, 1, 64, 60, 56),
        (6, 1, 24, 20, 16),
        active=0.2,
    ),
    "halo": Case(
        SpatialPartitionInferer(partitions=1),
        lambda: UNet(3, 1, 2, (8, 16), (2,), norm="instance"),
        (1, 1, 320, 192, 160),
        (1, 1, 16, 12, 10),
    ),
}


@pytest.fixture
def leave() -> Iterator[Callable[[int], None]]:
    """``leave(n)``: torch may take n bytes of the GPU more than now, until the test ends."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, whose memory torch can bound")

    def bound(nbytes: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(GPU).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(GPU) + nbytes) / total), GPU)

    yield bound
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    torch.cuda.empty_cache()


def outcome(case: Case, volume: Tensor, network: nn.Module) -> Tensor | str:
    """A result, or a refusal."""
    try:
        return case.inferer(volume, network)  # type: ignore[no-any-return]
    except InputError as refusal:
        return str(refusal)


def said(found: Tensor | str, whole: Tensor) -> str:
    """A refusal that says what was needed and what there is; nothing where the result is the whole one."""
    if isinstance(found, Tensor):
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
        return ""
    assert "\n" not in found
    assert re.search(r"needs \d+ bytes of \S+ or more, which has \d+ bytes, \d+ of them free", found), found
    return found


def peak_of(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Result, and the peak of bytes above what was alive."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    return work(), torch.cuda.max_memory_allocated(GPU) - before


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_full_gpu(name: str, leave: Callable[[int], None]) -> None:
    case = CASES[name]
    network, volume = fill_asymmetric(case.network()).double().eval().to(GPU), case.volume(case.large)
    outcome(case, volume, network)  # libraries keep workspaces from their first use on
    whole, peak = peak_of(lambda: case.inferer(volume, network))
    assert peak > 100 * 2**20, f"{peak} bytes are too few to be bounded"
    enough, refusals = 0.5, {}  # half of it is enough for smaller parts
    if case.smallest is not None:
        _, least = peak_of(lambda: case.smallest(volume, network))
        enough = max(enough, (1.5 * least + 4 * SEGMENT) / peak)
    for share in (enough, 0.25, 0.06, 0.0):
        leave(int(share * peak))
        refusals[share] = said(outcome(case, volume, network), whole)
    assert not refusals[enough], refusals
    assert refusals[0.0]
    leave(2 * peak)  # a refusal leaves nothing behind
    assert not said(outcome(case, volume, network), whole)


class Bounded(Watcher):
    """The host as a device of few bytes, whose allocator says what that of a GPU says."""

    def __init__(self, nbytes: int, alive: list[Tensor]) -> None:
        self.tracker, self._most = StorageTracker(), nbytes
        self.tracker.note_older(alive)
        super().__init__(self.tracker)

    def __torch_dispatch__(self, *call: Any, **rest: Any) -> Any:
        """Run an operation, and take its result back where it is too much."""
        held = self.tracker.live
        result = super().__torch_dispatch__(*call, **rest)
        more = self.tracker.live - held
        if more > 0 and held + more > self._most:
            del result
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {more} bytes. GPU 0 has a total capacity of 79.10 GiB of which "
                f"70.00 GiB is free. {self._most} bytes allowed; Of the allocated memory {held} bytes is allocated by "
                "PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
            )
        return result


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["slabs", "octree", "sparse", "halo"])
def test_a_host_of_few_bytes(name: str) -> None:
    case = CASES[name]
    volume = case.volume(case.small)
    network = fill_asymmetric(case.network()).double().eval()
    whole: Tensor = case.inferer(volume, network)  # plans are made
    alive, found = [volume, whole, *network.parameters(), *network.buffers()], []
    with Bounded(2**40, alive) as host:
        found.append(outcome(case, volume, network))
    for share in (0.8, 0.06):  # results, and what halo stores, are on the same device here
        with Bounded(int(share * host.tracker.peak), alive):
            found.append(outcome(case, volume, network))
    free, much, little = (said(one, whole) for one in found)
    assert not free
    assert name == "slabs" or not much
    assert name == "octree" or little

"""A GPU that is truly full: the inferers go on in smaller parts with the same result, or refuse in words with bytes."""

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
from monai_memeff.occupancy import OccupancyNet, OctreeInferer
from monai_memeff.sparse import SparseInferer, SparseUNet
from tests.oracles import asymmetric, fill_asymmetric

GPU = torch.device("cuda", 0)


class Case(NamedTuple):
    """An inferer whose one pass takes hundreds of MiB, far more than the allocator's smallest segments."""

    inferer: Inferer
    network: Callable[[], nn.Module]
    volume: Callable[[], Tensor]


def sparse_volume() -> Tensor:
    """Six volumes with a fifth of their voxels active."""
    values = asymmetric((6, 1, 64, 60, 56))
    return values * (torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.2)


CASES = {
    "slabs": Case(
        SlabInferer(slab=16),
        lambda: CLSTMUNet(channels=(8, 16), hidden_channels=4, out_channels=3),
        lambda: asymmetric((1, 1, 192, 160, 40)),
    ),
    "octree": Case(
        OctreeInferer(points_per_pass=2**18, stride=1),
        lambda: OccupancyNet(1, 3, channels=(4, 8)),
        lambda: asymmetric((1, 1, 64, 60, 56)),
    ),
    "sparse": Case(
        SparseInferer(),
        lambda: SparseUNet(3, 1, 2, channels=(8, 16), strides=(2,), num_res_units=1),
        sparse_volume,
    ),
    "halo": Case(
        SpatialPartitionInferer(partitions=1),
        lambda: UNet(3, 1, 2, (8, 16), (2,), num_res_units=1, norm="instance"),
        lambda: asymmetric((1, 1, 160, 128, 96)),
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
    network, volume = fill_asymmetric(case.network()).double().eval().to(GPU), case.volume().double()
    inferer: Any = case.inferer
    inferer(volume, network)  # libraries keep workspaces from their first use on
    whole, peak = peak_of(lambda: inferer(volume, network))
    assert peak > 100 * 2**20, f"{peak} bytes are too few to be bounded"
    said = {}
    for share in (0.5, 0.25, 0.06, 0.0):
        leave(int(share * peak))
        try:
            result = inferer(volume, network)
        except InputError as refusal:
            said[share] = str(refusal)
        else:
            torch.testing.assert_close(result, whole, rtol=0, atol=1e-9)
    assert 0.5 not in said, said  # half of it is enough for smaller parts
    assert 0.0 in said
    for refusal in said.values():
        assert "\n" not in refusal
        assert len(re.findall(r"\d+ bytes", refusal)) >= 2, refusal  # what it needs, what there is
    leave(2 * peak)  # a refusal leaves nothing behind
    torch.testing.assert_close(inferer(volume, network), whole, rtol=0, atol=1e-9)

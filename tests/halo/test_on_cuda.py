"""On a true GPU: the networks of the matrix streamed through it, and ranks that live on it, equal the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.halo.run.pinned import locked
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.memory import measure_peak
from tests.halo.matrix import ENTRIES
from tests.halo.networks import NETWORKS
from tests.halo.partitioned import clones, difference, try_settings
from tests.halo.ranks.compare import worst
from tests.halo.ranks.test_network import MORE, SIZES, made, volume
from tests.halo.study import DOUBLE, SINGLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.export captures on true devices only"),
]
BOTH, GPU = {**NETWORKS, **MORE}, torch.device("cuda", 0)


def moved(tree: Any, device: torch.device) -> Any:
    """The tensors of an argument on a device."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if not entry.big])
def test_streaming(name: str) -> None:
    entry = ENTRIES[name]
    tolerance = DOUBLE if entry.dtype == torch.float64 else SINGLE
    settings = [(0, 8), (len(entry.shape) - 3, 2)]
    tally = try_settings(entry.network().to(GPU), moved(entry.arguments(), GPU), settings, tolerance=tolerance)
    assert not tally.refused or not entry.convolutional, tally.refused


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.fast])
@pytest.mark.parametrize("store", ["host", "folder"])
@torch.no_grad()
def test_a_volume_on_the_host(name: str, store: str, tmp_path: Path) -> None:
    network, args = ENTRIES[name].network(), ENTRIES[name].arguments()
    expected = network(*clones(args))
    inferer = SpatialPartitionInferer(3, store=tmp_path if store == "folder" else store, device=GPU)
    found = inferer(args[0], network.to(GPU), *moved(args[1:], GPU))
    assert difference(moved(found, torch.device("cpu")), expected) < 1e-8


@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
@pytest.mark.parametrize("name", ["UNet instance", "BasicUNet deconv", "ResidualEncoderUNet", "SegResNetDS"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_budget_is_a_promise(name: str, share: float, precision: torch.dtype) -> None:
    network = made(NETWORKS[name]).to(GPU, precision).eval()
    x = torch.randn(1, 1, 192, 160, 128, device=GPU, dtype=precision)
    network(x[:, :, :64])  # libraries keep workspaces from their first use on
    with measure_peak(GPU) as meter:
        expected = network(x)
    inferer = SpatialPartitionInferer(memory_budget=int(share * meter.peak_bytes))
    found = inferer(x.cpu(), network)
    assert difference(found, expected) < (1e-9 if precision == torch.float64 else 1e-4)
    report = inferer.last_report
    assert report is not None
    assert report.device_peak_bytes <= inferer.memory_budget
    assert report.planned_peak_bytes <= inferer.memory_budget


def test_memory_that_cannot_be_locked_is_used_as_it_is() -> None:
    block = torch.zeros(2**20, dtype=torch.uint8)
    assert locked(block, GPU)
    assert not locked(block, GPU)  # it is already
    assert int(torch.ones(3, device=GPU).sum()) == 3  # no error is left behind
    assert int(torch.cuda.cudart().cudaHostUnregister(block.data_ptr())) == 0


@pytest.mark.parametrize("name", list(BOTH))
def test_two_ranks_equal_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HaloMesh, "device", GPU)
    space = next((s for prefix, s in SIZES.items() if name.startswith(prefix)), (20, 8, 8))
    assert worst(made(BOTH[name]).to(GPU), [volume(2, 1, *space).to(GPU)]) < 1e-9

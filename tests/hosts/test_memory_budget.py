"""`memory_budget` of the inferers: a bound that is measured, a refusal that names what fits, and going on after OOM."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet
from torch import Tensor

from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.errors import InputError
from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from monai_memeff.halo.planning.tile import Worker
from monai_memeff.memory import measure_peak
from monai_memeff.memory.budget import fitting_part
from monai_memeff.occupancy import OccupancyNet, OctreeInferer
from monai_memeff.sparse import SparseInferer, SparseUNet

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "1.50 GiB is free. Of the allocated memory 60.25 GiB is allocated by PyTorch, and "
    "1.00 GiB is reserved by PyTorch but unallocated."
)


def clstm(bidirectional: bool) -> CLSTMUNet:
    return CLSTMUNet(channels=(4, 8), hidden_channels=2, out_channels=3, bidirectional=bidirectional).double().eval()


def out_of_memory(method: Callable[..., Any], most: int, size: Callable[..., int]) -> Callable[..., Any]:
    """The method on a device that has memory for so much."""

    def limited(*inputs: Any) -> Any:
        if size(*inputs) > most:
            raise torch.OutOfMemoryError(FULL)
        return method(*inputs)

    return limited


def peak(action: Callable[[], Tensor]) -> tuple[Tensor, int]:
    with torch.no_grad(), measure_peak() as meter:
        result = action()
    return result, meter.peak_bytes


@pytest.mark.parametrize(("bidirectional", "labels"), [(False, True), (True, False)])
@pytest.mark.long
def test_slabs_stay_within_the_budget(bidirectional: bool, labels: bool) -> None:
    network, volume = clstm(bidirectional), torch.randn(1, 1, 12, 16, 15, dtype=torch.float64)
    whole, free = peak(lambda: SlabInferer(slab=16, labels=labels)(volume, network))
    with pytest.raises(InputError, match="memory_budget is 1000") as caught:
        SlabInferer(slab=16, labels=labels, memory_budget=1000)(volume, network)
    least = int(re.search(r"take (\d+): raise", str(caught.value))[1])  # type: ignore[index]
    assert least < free
    for budget in (least, least + (free - least) // 2):
        result, used = peak(lambda b=budget: SlabInferer(slab=16, labels=labels, memory_budget=b)(volume, network))
        assert used <= budget
        torch.testing.assert_close(result, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("most", [1, 3, 7])
def test_slabs_go_on_after_running_out(bidirectional: bool, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, volume = clstm(bidirectional), torch.randn(2, 1, 9, 11, 21, dtype=torch.float64)
    whole = SlabInferer(slab=8)(volume, network)
    for name in ("sweep", "state_before") if bidirectional else ("sweep",):
        limited = out_of_memory(getattr(network, name), most, lambda slab, *_: slab.shape[-1])
        monkeypatch.setattr(network, name, limited)
    torch.testing.assert_close(SlabInferer(slab=8)(volume, network), whole, rtol=0, atol=1e-9)
    monkeypatch.setattr(network, "sweep", out_of_memory(network.sweep, 0, lambda slab, *_: slab.shape[-1]))
    with pytest.raises(
        InputError, match=r"one slice of .* needs \d+ bytes of cpu or more, which has \d+ bytes, \d+ of them free"
    ):
        SlabInferer(slab=8)(volume, network)


def test_two_walks_at_once_have_limits_of_their_own() -> None:
    network, inferer = clstm(False), SlabInferer(labels=True)
    volumes = [torch.randn(1, 1, 9, n, 12, dtype=torch.float64) for n in (8, 11)]
    walks = [inferer(volume.split(4, -1), network) for volume in volumes]
    found = list(zip(*walks, strict=True))
    for n, volume in enumerate(volumes):
        assert torch.equal(torch.cat([pair[n] for pair in found], -1), inferer(volume, network))


@pytest.mark.long
def test_points_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    network, volume = OccupancyNet(1, 3, channels=(4, 8)).eval(), torch.randn(1, 1, 9, 8, 7)
    whole = OctreeInferer(stride=1)(volume, network)
    with pytest.raises(InputError, match="memory_budget is 1000") as caught:
        OctreeInferer(stride=1, memory_budget=1000)(volume, network)
    encode = int(re.search(r"takes (\d+) to look", str(caught.value))[1])  # type: ignore[index]
    used: list[int] = []
    query = network.query

    def measured(*inputs: Any) -> Tensor:
        result, taken = peak(lambda: query(*inputs))
        used.append(taken)
        return result

    monkeypatch.setattr(network, "query", measured)
    OctreeInferer(stride=1)(volume, network)
    free = max(used)
    budget = max(encode, free // 3)
    assert budget < free
    used.clear()
    torch.testing.assert_close(OctreeInferer(stride=1, memory_budget=budget)(volume, network), whole)
    assert max(used) <= budget


def test_points_go_on_after_running_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network, volume = OccupancyNet(1, 3, channels=(4, 8)).eval(), torch.randn(1, 1, 24, 20, 22)
    whole = OctreeInferer(stride=2)(volume, network)
    query = network.query
    monkeypatch.setattr(network, "query", out_of_memory(query, 100, lambda latent, points, _: points.shape[1]))
    inferer = OctreeInferer(stride=2)
    torch.testing.assert_close(inferer(volume, network), whole)
    monkeypatch.setattr(network, "query", out_of_memory(query, 0, lambda latent, points, _: points.shape[1]))
    with pytest.raises(
        InputError, match=r"one point .* needs \d+ bytes of cpu or more, which has \d+ bytes, \d+ of them"
    ):
        inferer(volume, network)


def unet() -> UNet:
    """Its norms see the whole volume: a part that is counted twice changes every voxel."""
    return UNet(3, 1, 2, (4, 8), (2,), num_res_units=1, norm="instance").double().eval()


@pytest.mark.slow
def test_parts_stay_within_the_budget_and_a_refusal_names_what_fits() -> None:
    network, volume, budget = unet(), torch.randn(1, 1, 22, 12, 10, dtype=torch.float64), 1000
    while True:  # a refusal names what the first step that does not fit needs, and a later one may need more
        inferer, said = SpatialPartitionInferer(memory_budget=budget), ""
        try:
            result = inferer(volume, network)
            break
        except NotPartitionableError as refusal:
            said = str(refusal)
        named = re.search(rf"needs (\d+) bytes .* the memory budget is {budget} bytes", said)
        assert named
        assert int(named[1]) > budget
        budget = int(named[1])
    torch.testing.assert_close(result, network(volume), rtol=0, atol=1e-9)
    assert inferer.last_report is not None
    assert inferer.last_report.device_peak_bytes <= budget


@pytest.mark.parametrize(("partitions", "labels"), [(1, False), (3, True)])
@pytest.mark.slow
def test_parts_go_on_after_running_out(partitions: int, labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, volume = unet(), torch.randn(1, 1, 22, 12, 10, dtype=torch.float64)
    whole = SpatialPartitionInferer(partitions, labels=labels)(volume, network)
    tile, done = Worker.tile, []

    def limited(worker: Any, job: Any, box: Any, *rest: Any) -> Any:
        """Runs out at the last moment, when everything is written and added up."""
        result = tile(worker, job, box, *rest)
        if worker.env.device.type == "meta":  # the plan's dry run
            return result
        if box[0][1] - box[0][0] > 3:
            raise torch.OutOfMemoryError(FULL)
        done.append((job.index, box))
        return result

    monkeypatch.setattr(Worker, "tile", limited)
    inferer = SpatialPartitionInferer(partitions, labels=labels)
    torch.testing.assert_close(inferer(volume, network), whole, rtol=0, atol=1e-9)
    assert len(set(done)) == len(done)  # nothing was done again
    assert inferer.last_report is not None
    assert inferer.last_report.partitions >= 22 / 3

    def none_left(worker: Any, *rest: Any) -> Any:
        if worker.env.device.type == "meta":
            return tile(worker, *rest)
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(Worker, "tile", none_left)
    with pytest.raises(
        InputError, match=r"needs \d+ bytes of cpu even in 11 tiles, and they are not free .*needs \d+ bytes of cpu or"
    ):
        inferer(volume, network)


def test_another_error_of_a_part_is_not_taken_for_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    network, volume, inferer = unet(), torch.randn(1, 1, 22, 12, 10, dtype=torch.float64), SpatialPartitionInferer(2)
    inferer.prepare(volume, network)

    def broken(*_: Any) -> Any:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(Worker, "tile", broken)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        inferer(volume, network)


@torch.no_grad()
@pytest.mark.slow
def test_sparse_volumes_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network = SparseUNet(3, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1).eval()
    # large enough that a single volume is not gathered in one product, which takes more than parts of three do
    volume = torch.rand(3, 1, 24, 26, 28) * (torch.rand(3, 1, 24, 26, 28) < 0.2)
    whole, free = peak(lambda: SparseInferer()(volume, network))
    with pytest.raises(InputError, match="needs more than memory_budget = 1000, it took") as caught:
        SparseInferer(memory_budget=1000)(volume, network)
    single = int(re.search(r"it took (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert single < free
    torch.testing.assert_close(SparseInferer(memory_budget=2 * single)(volume, network), whole)
    limited = out_of_memory(network.forward, 1, lambda tensor: tensor.batch_size)
    monkeypatch.setattr(network, "forward", limited)
    torch.testing.assert_close(SparseInferer()(volume, network), whole)
    monkeypatch.setattr(network, "forward", out_of_memory(network.forward, 0, lambda tensor: tensor.batch_size))
    with pytest.raises(InputError, match=r"needs \d+ bytes of cpu or more, which has \d+ bytes, \d+ of them"):
        SparseInferer()(volume[:1], network)


def test_a_budget_that_is_not_there_ends_at_the_part_that_ran_out() -> None:
    peak = out_of_memory(lambda part: 8 * part, 5, lambda part: part)
    assert fitting_part(100, peak, 10**9, "slices") == 4
    with pytest.raises(torch.OutOfMemoryError):
        fitting_part(100, peak, 10**9, "slices", first=8)


@pytest.mark.parametrize("kind", [SlabInferer])
def test_no_budget_below_one_byte(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_budget must be (a whole number of )?at least 1"):
        kind(memory_budget=0)

"""What a GPU does otherwise, shown on the CPU: backward passes in other threads, streams, what its kernels refuse."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from monai_memeff.halo import (
    Hub,
    PartitionPrepareBatch,
    no_mesh,
    norm,
    scatter,
    spatial_partition,
    virtual_mesh,
)
from monai_memeff.halo.mesh import HaloMesh
from monai_memeff.memory import checkpoint, measure_peak
from tests.fake_cuda import fake_cuda_device


class Recomputed(nn.Module):
    """Layers inside a checkpoint, one of them random."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.inside = nn.Sequential(nn.Conv3d(4, 4, 3, stride=2, padding=1), nn.Dropout(0.5), nn.Conv3d(4, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, self.first(x))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_autograd_may_recompute_in_a_thread_of_its_own(elsewhere: bool) -> None:
    torch.manual_seed(0)
    network, x = spatial_partition(Recomputed(), no_mesh()), torch.randn(1, 1, 8, 8, 8)
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        network.zero_grad()
        loss = (network(x) if recompute else plainly(network, x)).square().sum()
        thread = threading.Thread(target=loss.backward) if elsewhere else None
        if thread is None:
            loss.backward()
        else:
            thread.start()
            thread.join()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == 6
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


def plainly(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same forward pass with its activations kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.checkpoint", lambda function, *args: function(*args))
        return network(x)


def test_a_virtual_rank_goes_backward_in_its_own_thread() -> None:
    assert Hub(2).run(lambda _: torch._C._is_multithreading_enabled()) == [False, False]
    assert torch._C._is_multithreading_enabled()


def test_virtual_ranks_work_on_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def stream(name: str) -> Iterator[None]:
        entered.append((name, threading.get_ident()))
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "the caller's")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    threads = Hub(2).run(lambda _: threading.get_ident())
    assert sorted(entered) == sorted(("the caller's", thread) for thread in threads)


class CUDAsBatchNorm(TorchDispatchMode):
    """Refuses what batch norm's backward pass on CUDA cannot do: sums over a channel without a weight."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            self.seen += 1
            assert args[2] is not None or not any(args[-1][1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.InstanceNorm3d(4),
        lambda: nn.InstanceNorm3d(4, affine=True),
        lambda: nn.BatchNorm3d(4, affine=False),
        lambda: nn.GroupNorm(2, 4),
    ],
    ids=["instance", "affine instance", "batch", "group"],
)
@pytest.mark.parametrize("low", [False, True])
def test_normalizations_ask_for_what_cuda_computes(layer: Callable[[], nn.Module], low: bool) -> None:
    network = spatial_partition(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), layer()), no_mesh())
    with torch.autocast("cpu", torch.bfloat16, enabled=low), CUDAsBatchNorm() as mode:
        network(torch.randn(2, 1, 4, 4, 4)).float().tanh().square().sum().backward()
    assert mode.seen == 1
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_need_no_float_copy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(2, 16, 1000) * 200 + 300).to(dtype)
    at_once = norm._moments(x)
    monkeypatch.setattr(norm, "WIDENED", 4000)
    with measure_peak() as meter:
        found = norm._moments(x)
    assert meter.peak_bytes < x.nbytes / 2
    torch.testing.assert_close(found, at_once)
    assert found[1].dtype == torch.float32
    assert bool(found[1].isfinite().all())


def test_a_volume_on_the_host_is_sent_by_nccl_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, volume = Hub(2), torch.randn(1, 1, 8, 4, 4)
    mesh = virtual_mesh(hub, (2,))
    with fake_cuda_device():
        monkeypatch.setattr(HaloMesh, "device", torch.device("cuda", 0))
        parts = hub.run(lambda rank: scatter(volume if rank == 0 else None, mesh, src=0))
        assert [part.device.type for part in parts] == ["cuda", "cuda"]
        assert torch.equal(torch.cat([part.cpu() for part in parts], 2), volume)


def test_a_batch_is_cut_before_it_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, arrived = Hub(2), []
    mesh, batch = virtual_mesh(hub, (2,)), {"image": torch.randn(1, 1, 8, 4, 4), "label": torch.ones(1, 1, 8, 4, 4)}
    with fake_cuda_device() as gpu:
        put = gpu.put
        monkeypatch.setattr(gpu, "put", lambda value, on_gpu=True: arrived.append(value.numel()) or put(value, on_gpu))
        found = hub.run(lambda _: PartitionPrepareBatch(mesh)(batch, torch.device("cuda", 0)))
        assert [tensor.device.type for part in found for tensor in part] == ["cuda"] * 4
        assert arrived == [64] * 4  # halves; the whole has 128 voxels
        assert torch.equal(torch.cat([image.cpu() for image, _ in found], 2), batch["image"])

    def prepare(batchdata: dict[str, torch.Tensor], device: object, non_blocking: bool) -> tuple[torch.Tensor, ...]:
        assert device is None
        return batchdata["image"], batchdata["label"]

    assert len(PartitionPrepareBatch(no_mesh(), prepare)(batch, "cpu")) == 2

"""What a GPU does otherwise, shown on the CPU: backward in other threads, what its kernels refuse, what travels."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from monai_memeff.halo import PrepareBatchPartition, init_mesh, scatter, spatial_partition
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from tests.fake_cuda import fake_cuda_device
from tests.halo.ranks.threads import run_ranks


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.slow
def test_autograd_may_recompute_in_a_thread_of_its_own(elsewhere: bool) -> None:
    torch.manual_seed(0)
    convs = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 3, stride=2, padding=1), nn.Conv3d(4, 2, 1)
    start, x = nn.Sequential(*convs[:2], nn.Dropout(0.5), convs[2]), torch.randn(1, 1, 8, 8, 8)
    found = []
    for segments in (1, 3):
        torch.manual_seed(1)
        network = spatial_partition(copy.deepcopy(start), init_mesh(spatial=(1,)), segments)
        loss = network(x).square().sum()
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
@pytest.mark.slow
def test_normalizations_ask_for_what_cuda_computes(layer: Callable[[], nn.Module], low: bool) -> None:
    network = spatial_partition(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), layer()), init_mesh(spatial=(1,)))
    with torch.autocast("cpu", torch.bfloat16, enabled=low), CUDAsBatchNorm() as mode:
        network(torch.randn(2, 1, 4, 4, 4)).float().tanh().square().sum().backward()
    assert mode.seen == 1
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


def test_a_volume_on_the_host_is_sent_by_nccl_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = torch.randn(1, 1, 8, 4, 4)
    with fake_cuda_device():
        monkeypatch.setattr(HaloMesh, "device", torch.device("cuda", 0))
        parts = run_ranks(lambda mesh: scatter(None if mesh.comm.rank else volume, mesh, src=0))
        assert [part.device.type for part in parts] == ["cuda", "cuda"]
        assert torch.equal(torch.cat([part.cpu() for part in parts], 2), volume)


def test_a_batch_is_cut_before_it_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[int] = []
    batch = {"image": torch.randn(1, 1, 8, 4, 4), "label": torch.ones(1, 1, 8, 4, 4)}
    with fake_cuda_device() as gpu:
        put = gpu.put
        monkeypatch.setattr(gpu, "put", lambda value, on_gpu=True: arrived.append(value.numel()) or put(value, on_gpu))
        found = run_ranks(lambda mesh: PrepareBatchPartition(mesh)(batch, torch.device("cuda", 0)))
        assert [tensor.device.type for part in found for tensor in part] == ["cuda"] * 4
        assert arrived == [64] * 4  # halves; the whole has 128 voxels
        assert torch.equal(torch.cat([image.cpu() for image, _ in found], 2), batch["image"])

    def prepare(batchdata: dict[str, torch.Tensor], device: object, non_blocking: bool) -> tuple[torch.Tensor, ...]:
        assert device is None
        return batchdata["image"], batchdata["label"]

    assert len(PrepareBatchPartition(init_mesh(spatial=(1,)), prepare)(batch, "cpu")) == 2

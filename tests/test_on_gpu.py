"""Every network computes on a GPU what it computes on the CPU; without a GPU, on a fake one that minds devices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.occupancy import OccupancyNet, OctreeInferer
from monai_memeff.sparse import (
    CoarseToSparseUNet,
    SparseCompletionLoss,
    SparseCompletionNet,
    SparseUNet,
    backends,
    keep_kernel_maps,
)
from tests.fake_cuda import fake_cuda_device
from tests.halo.networks import unet
from tests.oracles import assert_tensors_agree, asymmetric, fill_asymmetric

CPU, TRUE_GPU = torch.device("cpu"), torch.cuda.is_available()
SHAPE = (2, 1, 16, 8, 24)
ROUNDING = 1e-8
"""The bias before a norm has no gradient but what rounding leaves of large terms, and a GPU adds them otherwise."""


def clstm(**options: object) -> nn.Module:
    """A small bidirectional network."""
    return CLSTMUNet(3, 1, 2, (2, 4), 2, bidirectional=True, checkpoint=2, **options)  # type: ignore[arg-type]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "SparseUNet instance": lambda: SparseUNet(3, 1, 2, (2, 4, 4), (2, 2), num_res_units=1, act="leakyrelu"),
    "SparseUNet batch": lambda: SparseUNet(3, 1, 2, (2, 4), (2,), norm="batch"),
    "CoarseToSparseUNet": lambda: CoarseToSparseUNet(
        3, 1, 2, (2, 4), (2,), refine_channels=(2, 4), refine_strides=(2,), max_active=0.3, use_checkpoint=True
    ),
    "OccupancyNet": lambda: OccupancyNet(1, 2, channels=(2, 4), variant="interpolated", width=8),
    "OccupancyNet as published": lambda: OccupancyNet(1, 1, SHAPE[2:], channels=(2, 4), variant="d", width=8),
    "CLSTMUNet": clstm,
    "CLSTMUNet waiting on the host": lambda: clstm(offload_to_cpu=True, recompute=0.5),
}


@pytest.fixture
def _native() -> Iterator[None]:
    """What cannot be faked is left to other tests: engines that need a real GPU."""
    backends.use("native")
    yield
    backends.use(None)


pytestmark = pytest.mark.usefixtures("_native")


def volume() -> Tensor:
    """A third of it background."""
    values = asymmetric(SHAPE)
    return values * (values.abs() > 0.3)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Of the weights, brought home."""
    return {name: weight.grad.cpu() for name, weight in network.named_parameters() if weight.grad is not None}


def a_step(network: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Result and gradients on a device."""
    network = copy.deepcopy(network).to(device)
    x = volume().to(device).requires_grad_()
    result = network(x)
    assert x.device.type == device.type
    (result * asymmetric(result.shape).to(result.device)).sum().backward()
    assert x.grad is not None
    found = {"result": result.detach().cpu(), "x": x.grad.cpu(), **gradients(network)}
    return {name: torch.where(value.abs() < ROUNDING, 0.0, value) for name, value in found.items()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_a_training_step(name: str, gpu: torch.device) -> None:
    network = fill_asymmetric(NETWORKS[name]()).double()
    assert_tensors_agree(a_step(network, gpu), a_step(network, CPU))


def completion(network: SparseCompletionNet, device: torch.device) -> dict[str, Tensor]:
    """Loss and gradients on a device."""
    network = copy.deepcopy(network).to(device)
    whole = (volume() != 0).double().to(device)
    x, target = network.sparsify(whole * (asymmetric(SHAPE).to(device) > 0)), network.sparsify(whole)
    loss = SparseCompletionLoss()(network(x, target=target), target)
    loss.backward()
    return {"loss": loss.detach().cpu(), **gradients(network)}


@pytest.mark.filterwarnings("ignore:at stride 2 a volume would be refined")
@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.slow
def test_a_completion_step(use_checkpoint: bool, gpu: torch.device, tmp_path: Path) -> None:
    """With a budget that cuts, and kernel maps kept on the disk and taken from there the second time."""
    network = SparseCompletionNet((2,) * 7, max_voxels=1500, use_checkpoint=use_checkpoint)
    fill_asymmetric(network).double()
    keep_kernel_maps(tmp_path)
    try:
        for _ in range(2):
            assert_tensors_agree(completion(network, gpu), completion(network, CPU))
    finally:
        keep_kernel_maps(None)


@torch.no_grad()
@pytest.mark.parametrize(
    ("inferer", "network"),
    [
        (OctreeInferer(stride=4), NETWORKS["OccupancyNet"]),
        (SlabInferer(slab=5), clstm),
        (SpatialPartitionInferer(partitions=2), unet),
    ],
    ids=["octree", "slabs", "halo"],
)
@pytest.mark.parametrize("on_host", [True, False], ids=["volume on the host", "volume on the GPU"])
def test_inference(inferer: Inferer, network: Callable[[], nn.Module], on_host: bool, gpu: torch.device) -> None:
    if isinstance(inferer, SpatialPartitionInferer) and not TRUE_GPU:
        pytest.skip("torch.export captures networks on true devices only, not on a fake one")
    model = fill_asymmetric(network()).double().eval()
    expected = inferer(volume(), model)
    result = inferer(volume() if on_host else volume().to(gpu), copy.deepcopy(model).to(gpu))
    assert_tensors_agree({"logits": result.cpu()}, {"logits": expected.cpu()})


def test_what_the_fake_cuda_device_refuses() -> None:
    with fake_cuda_device():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device == torch.device("cuda:0")
        assert (there + 1).is_cuda
        assert not here.to("cuda").cpu().is_cuda
        with pytest.raises(RuntimeError, match=r"add.*on one device, but those of shape \[\(3,\)\] are"):
            there + here
        with pytest.raises(RuntimeError, match="indices must be on the CPU or on the device"):
            here[there.long()]
        with pytest.raises(TypeError, match="to numpy"):
            np.asarray(there)
        x = here.requires_grad_()
        (x.to("cuda") * there)[torch.zeros(2, dtype=torch.long, device="cuda")].sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [2, 0, 0]
    assert there.device.type == "cpu"

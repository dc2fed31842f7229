"""Whole volumes in one pass: the network's own answer, wherever volume and network are, and refusals."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor, decollate_batch
from monai.inferers import Inferer
from monai.networks.nets import UNet
from torch import Tensor, nn

from monai_memeff.sparse import SparseCompletionNet, SparseInferer, SparseTensor, SparseUNet
from tests.oracles import assert_tensors_agree

SHAPE = (9, 12, 11)


def unet(norm: str = "batch") -> SparseUNet:
    """A small network in evaluation mode."""
    return SparseUNet(3, 1, 3, channels=(2, 4), strides=(2,), num_res_units=1, norm=norm).eval()


def image(batch: int = 2) -> Tensor:
    """(B, 1, 9, 12, 11) with about a fifth of its voxels active; the items differ."""
    return torch.rand(batch, 1, *SHAPE) * (torch.rand(batch, 1, *SHAPE) < 0.2)


def test_it_is_monais_kind() -> None:
    assert isinstance(SparseInferer(), Inferer)


@torch.no_grad()
def test_the_answer_is_the_networks() -> None:
    network, volume = unet(), image()
    assert_tensors_agree({"logits": SparseInferer()(volume, network)}, {"logits": network(volume)})


@torch.no_grad()
def test_a_completion_network() -> None:
    network = SparseCompletionNet((2,) * 7).eval()
    volume = (image() > 0).float()
    assert_tensors_agree({"logits": SparseInferer()(volume, network)}, {"logits": network(volume)})


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, 1.0], ids=["empty", "full"])
def test_empty_and_full_volumes(value: float) -> None:
    volume = torch.full((1, 1, *SHAPE), value)
    logits = SparseInferer()(volume, unet())
    assert logits.shape == (1, 3, *SHAPE)
    assert torch.isfinite(logits).all()
    if value == 0:
        assert logits.argmax(1).sum() == 0


@torch.no_grad()
def test_sparse_in_sparse_out() -> None:
    network, volume = unet(), image()
    sparse = network.sparsify(volume)
    result = SparseInferer()(sparse, network)
    assert isinstance(result, SparseTensor)
    assert torch.equal(network.densify(result), network(volume))


@torch.no_grad()
def test_metadata_travels() -> None:
    affine = torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0]))
    volume = MetaTensor(image(), affine=affine, meta={"filename_or_obj": ["a", "b"]})
    volume.is_batch = True
    logits = SparseInferer()(volume, unet())
    assert isinstance(logits, MetaTensor)
    assert logits.is_batch
    parts = decollate_batch(logits)
    assert [p.shape for p in parts] == [(3, *SHAPE)] * 2
    assert not isinstance(SparseInferer()(volume.as_tensor(), unet()), MetaTensor)


class Wrapper(nn.Module):
    """What DistributedDataParallel does to a network: the network is ``module``, and calls pass through."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args: object, **kwargs: object) -> object:
        """Pass on."""
        self.calls += 1
        return self.module(*args, **kwargs)


@torch.no_grad()
def test_a_wrapped_network_is_called_through_its_wrapper() -> None:
    network, volume = unet(), image()
    wrapped = Wrapper(network)
    assert torch.equal(SparseInferer()(volume, wrapped), network(volume))
    assert wrapped.calls == 1


def test_arguments_are_passed_on() -> None:
    """In training mode the completion network takes the target through the inferer and gives a level each."""
    network = SparseCompletionNet((2,) * 7)
    volume = (image() > 0).float()
    sparse = network.sparsify(volume)
    levels = SparseInferer()(sparse, network, target=sparse)
    assert len(levels) == 6


@torch.no_grad()
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_voxels_travel_to_the_device(device: str | torch.device | None) -> None:
    network, volume = unet(), image()
    seen: list[torch.device] = []
    network.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].device))
    logits = SparseInferer(device)(volume, network)
    assert seen == [torch.device("cpu")]
    assert logits.device == volume.device


@torch.no_grad()
@pytest.mark.usefixtures("gpu")
def test_the_volume_stays_on_the_host() -> None:
    network, volume = unet(), image()
    expected = network(volume)
    logits = SparseInferer()(volume, network.cuda())
    assert logits.device.type == "cpu"
    assert_tensors_agree({"logits": logits}, {"logits": expected})


@torch.no_grad()
def test_autocast() -> None:
    network, volume = unet(), image()
    with torch.autocast("cpu", torch.bfloat16):
        logits = SparseInferer()(volume, network)
    assert logits.shape == (2, 3, *SHAPE)
    active = (volume != 0).expand_as(logits)
    error = (logits.float() - network(volume))[active].abs().max()
    assert error < 0.1


def test_a_dense_network_is_refused_in_one_line() -> None:
    dense = UNet(3, 1, 2, channels=(2, 4), strides=(2,))
    with pytest.raises(
        TypeError, match=r"^SparseInferer needs .* got UNet; use .*SlidingWindowInferer .*\.$"
    ) as caught:
        SparseInferer()(image(), dense)
    assert "\n" not in str(caught.value)

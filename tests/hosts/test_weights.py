"""A guarded network never answers with random weights, whatever a host does with a foreign checkpoint."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader
from monai.networks.nets import AttentionUnet, SegResNet, UNet
from torch import Tensor, nn

from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.hosts import require_weights
from monai_memeff.occupancy import OccupancyNet, OctreeInferer
from monai_memeff.sparse import SparseInferer, SparseUNet

UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8), "strides": (2,)}
OURS: dict[str, Callable[[], nn.Module]] = {
    "clstm": lambda: CLSTMUNet(out_channels=2, channels=(4, 8), hidden_channels=2),
    "occupancy": lambda: OccupancyNet(1, 2, channels=(4, 8)),
    "sparse": lambda: SparseUNet(**UNET),
}
INFERERS = {"clstm": SlabInferer(4), "occupancy": OctreeInferer(initial="grid"), "sparse": SparseInferer()}
FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "segresnet": lambda: SegResNet(init_filters=8, in_channels=1, out_channels=2),
    "attention": lambda: AttentionUnet(3, 1, 2, channels=(4, 8), strides=(2,)),
    **OURS,
}
PAIRS = [(own, other) for own in OURS for other in FOREIGN if own != other]
VOLUME = torch.rand(1, 1, 9, 8, 7) + 0.1


def built(name: str) -> nn.Module:
    return require_weights(OURS[name](), "the overlay").eval()


def label(network: nn.Module, state: dict[str, Tensor], _: Path) -> None:
    """As MONAI Label loads."""
    network.load_state_dict(state, strict=False)


def deploy(network: nn.Module, state: dict[str, Tensor], _: Path) -> None:
    network.load_state_dict(state, strict=True)


def bundle(network: nn.Module, state: dict[str, Tensor], path: Path, **options: Any) -> None:
    torch.save(state, path)
    CheckpointLoader(str(path), {"model": network}, **options)(Engine(lambda *_: None))


def bundle_not_strict(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    bundle(network, state, path, strict=False)


def bundle_any_shape(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    bundle(network, state, path, strict=False, strict_shape=False)


def bundle_nothing(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """``load_pretrain: false``."""


HOSTS = [label, deploy, bundle, bundle_not_strict, bundle_any_shape, bundle_nothing]


@pytest.mark.parametrize(("own", "other"), PAIRS)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.slow
def test_a_foreign_checkpoint_never_gives_labels(
    host: Callable[..., None], own: str, other: str, tmp_path: Path
) -> None:
    network, refused = built(own), []
    try:
        host(network, FOREIGN[other]().state_dict(), tmp_path / "model.pt")
    except Exception as error:
        refused.append(error)
    assert refused or host in (bundle_nothing, bundle_any_shape)
    with pytest.raises(ValueError, match="has random weights: no checkpoint was loaded"), torch.no_grad():
        INFERERS[own](VOLUME, network)
    if refused and host is label:
        assert "the checkpoint is not of the" in str(refused[0])
        assert "\n" not in str(refused[0])


@pytest.mark.parametrize("host", [label, deploy, bundle, bundle_not_strict])
@pytest.mark.parametrize("own", list(OURS))
def test_its_own_checkpoint_gives_what_the_network_gives(host: Callable[..., None], own: str, tmp_path: Path) -> None:
    """A checkpoint of a network without the guard, as older versions wrote it: keys and values are the same."""
    plain, network = OURS[own]().eval(), built(own)
    assert plain.state_dict().keys() == network.state_dict().keys()
    host(network, plain.state_dict(), tmp_path / "model.pt")
    with torch.no_grad():
        torch.testing.assert_close(INFERERS[own](VOLUME, network), INFERERS[own](VOLUME, plain), rtol=0, atol=0)


@pytest.mark.parametrize("own", list(OURS))
def test_parts_of_a_checkpoint_do_not_do(own: str) -> None:
    state = OURS[own]().state_dict()
    broken = [
        {},
        {f"module.{name}": value for name, value in state.items()},
        {"model": state},
        dict(list(state.items())[1:]),
        {**state, next(iter(state)): next(iter(state.values())).flatten()[:1]},
    ]
    for part in broken:
        network = built(own)
        with pytest.raises(ValueError, match=r"the checkpoint is not of the .* of the overlay"):
            network.load_state_dict(part, strict=False)
        with pytest.raises(ValueError, match="random weights"), torch.no_grad():
            network(VOLUME)


def test_dense_weights_are_a_sparse_networks_own() -> None:
    network = built("sparse")
    network.load_state_dict(UNet(**UNET).state_dict(), strict=False)
    with torch.no_grad():
        assert network(VOLUME).shape == (1, 2, *VOLUME.shape[2:])


@pytest.mark.parametrize("own", list(OURS))
def test_training_makes_weights_and_copies_have_their_own_mark(own: str) -> None:
    network = built(own)
    untouched = copy.deepcopy(network)
    with pytest.raises(ValueError, match="random weights"):  # gradients in evaluation are not training
        network(VOLUME)
    network.train()
    output = network(VOLUME, torch.zeros(1, 1, 3))[0] if own == "occupancy" else network(VOLUME)
    output.sum().backward()
    again = copy.deepcopy(network.eval())
    with torch.no_grad():
        torch.testing.assert_close(again(VOLUME), network(VOLUME))
        with pytest.raises(ValueError, match="random weights"):
            untouched(VOLUME)
        network.load_state_dict(network.state_dict())  # the best weights of this training, say
        network(VOLUME)
    with pytest.raises(ValueError, match="not of the"):
        network.load_state_dict(SegResNet().state_dict(), strict=False)


@pytest.mark.parametrize("own", list(OURS))
def test_every_entrance_refuses(own: str) -> None:
    network = built(own)
    calls: list[Callable[[], Any]] = [
        lambda: network(VOLUME),
        lambda: nn.Sequential(network)(VOLUME),
        lambda: nn.DataParallel(network)(VOLUME),
        *(lambda name=name: getattr(network, name)(VOLUME) for name in ("encode", "sweep") if hasattr(network, name)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="random weights"), torch.no_grad():
            call()


def test_a_network_can_be_saved_whole() -> None:
    file = io.BytesIO()
    torch.save(built("clstm"), file)
    file.seek(0)
    with pytest.raises(ValueError, match="random weights"), torch.no_grad():
        torch.load(file, weights_only=False)(VOLUME)

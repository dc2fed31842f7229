"""estimate_network: what it predicts is what `measure_peak` finds, and what it cannot know it refuses in one line."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from monai.networks.nets import SegResNet, SwinUNETR, UNet
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from monai_memeff.errors import InputError
from monai_memeff.memory import checkpoint, estimate_network, measure_peak
from monai_memeff.memory.step import run_step


class LooksAtValues(nn.Module):
    """Branches on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        return self.second(features.relu() if features.mean() > 0 else features.tanh())


class ThroughNumpy(LooksAtValues):
    """Leaves torch in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        kept = self.first(x)
        return self.second(kept * float(kept.detach().numpy().shape[0]))


class Spectrum(nn.Module):
    """Complex values out, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"spectrum": torch.fft.fftn(self.layer(x), dim=(2, 3, 4))}


class Recomputing(nn.Module):
    """Keeps nothing of its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.middle = nn.Sequential(*[nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.GELU()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.middle, self.first(x))


def unet(**more: object) -> UNet:
    return UNet(3, 1, 2, (4, 8, 8), (2, 2), num_res_units=1, **more)  # type: ignore[arg-type]


def swin() -> SwinUNETR:
    return SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))


NETWORKS = {
    "UNet": unet,
    "UNet, batch norm and dropout": lambda: unet(norm="batch", dropout=0.3),
    "SegResNet": lambda: SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), dropout_prob=0.2),
    "Spectrum": Spectrum,
    "Recomputing": Recomputing,
    "a transposed convolution to few channels": lambda: nn.Sequential(nn.Conv3d(1, 8, 3), nn.ConvTranspose3d(8, 2, 1)),
    "double precision": lambda: unet().double(),
    "compiled": lambda: torch.compile(unet()),
    "LooksAtValues": LooksAtValues,
    "ThroughNumpy": ThroughNumpy,
    "torch.jit": lambda: torch.jit.trace(unet().eval(), torch.rand(1, 1, 36, 24, 28)),
    "SwinUNETR": swin,
}


def measured(network: nn.Module, volume: Tensor, training: bool) -> int:
    network = getattr(network, "_orig_mod", network)
    network.zero_grad(set_to_none=True)
    with measure_peak() as meter:
        run_step(network, volume, training)
    return meter.peak_bytes


@pytest.mark.filterwarnings("ignore")  # of torch.jit
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.slow
def test_a_step_is_predicted(name: str, training: bool) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    assert isinstance(network, nn.Module)
    shape = (1, 1, 64, 64, 64) if name == "SwinUNETR" else (1, 1, 36, 24, 28)
    found = estimate_network(network, shape, training=training)
    volume = torch.rand(shape, dtype=next(network.parameters()).dtype)
    assert found.peak_bytes == pytest.approx(measured(network, volume, training), rel=0.02)
    assert found.gradient_bytes == (found.parameter_bytes if training and name == "UNet" else found.gradient_bytes)
    assert found.relative_time == 1
    assert all(p.grad is None or not is_fake(p.grad) for p in network.parameters())


@pytest.mark.slow
def test_large_volumes_take_no_memory() -> None:
    network = unet()
    with measure_peak() as meter:
        found = estimate_network(network, (1, 1, 512, 512, 512), training=True)
    assert found.peak_bytes > 2**33
    assert meter.peak_bytes < 2**20


def test_nothing_changes() -> None:
    network = unet(norm="batch", dropout=0.5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ids = {name: id(p) for name, p in network.named_parameters()}
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    estimate_network(network, (2, 1, 16, 16, 16), training=True)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {name: id(p) for name, p in network.named_parameters()} == ids
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states[1:]


@pytest.mark.slow
def test_a_network_that_looks_at_values_is_measured_on_small_volumes() -> None:
    torch.manual_seed(0)
    network, shape = LooksAtValues(), (1, 1, 97, 70, 101)
    before = torch.get_rng_state()
    found = estimate_network(network, shape)
    assert torch.equal(torch.get_rng_state(), before)
    assert "small volumes" in found.basis
    assert found.peak_bytes == pytest.approx(measured(network, torch.rand(shape), False), rel=0.1)


@pytest.mark.slow
def test_the_loss_and_the_optimizer_are_the_callers() -> None:
    network, shape = unet(), (1, 1, 16, 16, 16)

    def heavy(output: Tensor) -> Tensor:
        return torch.cat([output * n for n in range(200)]).square().mean()

    found = estimate_network(network, shape, training=True, loss=heavy, optimizer=torch.optim.Adam)
    with measure_peak() as meter:
        heavy(network(torch.rand(shape))).backward()
    assert found.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.02)
    weights = sum(p.nbytes for p in network.parameters())
    assert found.optimizer_bytes == 2 * weights
    assert found.total_bytes == found.peak_bytes + found.parameter_bytes + found.input_bytes + 2 * weights
    plain = estimate_network(network, shape, training=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert plain.optimizer_bytes == 0


def test_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate_network(unet(), (1, 1, 16, 16, 16), training=True)
    found.print()
    assert capsys.readouterr().out == f"{found}\n"
    assert "UNet, training step on (1, 1, 16, 16, 16), system dense" in str(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_shape": (1, 2, 16, 16, 16)}, "UNet does not take an input of .* to have 1 channels"),
        ({"input_shape": (1, 1, 17, 16, 16)}, "UNet does not take an input of"),
        ({"input_shape": (1, 1, 16, 0, 16)}, "whole numbers from 1 on"),
        ({"input_shape": (1, 1)}, "input_shape is"),
        ({"input_shape": "1,1,16"}, "input_shape is"),
        ({"input_shape": (1, 1, 16.0, 16, 16)}, "input_shape is"),
        ({"system": "warp"}, "choose dense, halo"),
        ({"memory_budget": 1024}, "memory_budget is 1024: raise it, or take system='halo'"),
        ({"memory_budget": 0}, "from 1 on, got 0"),
        ({"memory_budget": True}, "from 1 on, got True"),
        ({"memory_budget": 1e9}, "whole number of bytes"),
        ({"network": unet}, "takes an nn.Module, got function"),
        ({"network": nn.LazyConv3d(2, 3)}, "call it once on a small input"),
        ({"network": unet().requires_grad_(False), "training": True}, "has a gradient"),
    ],
)
def test_what_cannot_be_known_is_refused_in_one_line(change: dict, words: str) -> None:
    arguments = {"network": unet(), "input_shape": (1, 1, 16, 16, 16), **change}
    with pytest.raises(InputError, match=words) as caught:
        estimate_network(**arguments)
    assert "\n" not in str(caught.value)

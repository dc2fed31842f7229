"""What a refusal says: the module's path, the user's line, what was done there, and the way out, in one sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from monai_memeff.halo import (
    NotPartitionableError,
    SpatialPartitionInferer,
    explain,
    init_mesh,
    spatial_partition,
    verify,
)
from monai_memeff.halo.planning.capture import capture
from tests.halo.kinds import small_conv
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import try_settings


@torch.library.custom_op("memeff_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


_LIBRARY = torch.library.Library("memeff_tests", "FRAGMENT")
_LIBRARY.define("tripled(Tensor x) -> Tensor")
_LIBRARY.impl("tripled", lambda x: x * 3, "CPU")


@dataclasses.dataclass
class Unknown:
    """An output that torch cannot take apart."""

    volume: torch.Tensor


class OfNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


CODE: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "branch": (lambda x: x * 2 if x.mean() > 0 else x - 1, "a branch, an index or a size depends on the data"),
    "assertion": (lambda x: [x, x.isnan().any().__bool__()][0], "torch.where"),
    "length": (lambda x: x[:, :, : int(x.abs().sum()) % 5 + 3], "depends on the data"),
    "item": (lambda x: x * x.mean().item(), "aten.item.default gives a number that depends on the data"),
    "list": (lambda x: x * x.mean((0, 2, 3, 4)).tolist()[0], "depends on the data"),
    "equal": (lambda x: x if torch.equal(x, x * 1) else x * 2, "the result of aten.equal.default depends on the data"),
    "mask": (lambda x: x * x[x > 0].mean(), "aten.index.Tensor has a result whose size depends on the data"),
    "NumPy": (lambda x: x + torch.from_numpy(x.numpy().mean(0)), "NumPy, C++, torch.func"),
    "NumPy in a function": (OfNumpy.apply, "use torch's operators"),
    "another class": (lambda x: x.as_subclass(torch.Tensor) * 2, "as_subclass"),
    "text": (lambda x: x * len(f"{x.mean():.3f}"), "written into a text"),
    "sparse": (lambda x: x + x.to_sparse().to_dense(), "use a dense one"),
    "torch.cond": (lambda x: torch.cond(x.mean() > 0, torch.sin, torch.cos, (x,)), "cond runs code of its own"),
    "bernoulli": (lambda x: x * torch.bernoulli(x, p=1.5), "takes a probability from 0 to 1 but got 1.5"),
    "uniform": (lambda x: x + torch.empty_like(x).uniform_(2, 1), "takes bounds in order but got 2.0 and 1.0"),
    "custom operator": (doubled, "has no fake kernel"),
    "library operator": (
        lambda x: torch.ops.memeff_tests.tripled(x),
        "memeff_tests.tripled.default has no fake kernel",
    ),
}


@pytest.mark.parametrize("name", CODE)
def test_a_refusal_says_where_and_what(name: str) -> None:
    code, said = CODE[name]
    (reason,) = explain(nn.Sequential(nn.Identity(), Call(name, code)), (1, 2, 8, 6, 5))
    assert reason.startswith("1 (Call), /"), reason
    assert said in reason
    assert "Error" not in reason
    assert "\n" not in reason
    assert len(reason) < 400


def test_a_size_of_the_data_is_named_with_gradients_too() -> None:
    network = nn.Sequential(nn.Conv3d(2, 2, 1), Call("mask", lambda x: x * x[x > 0].mean()))
    with pytest.raises(NotPartitionableError, match=r"^1 \(Call\), /.* has a result whose size depends on the data"):
        capture(network, (torch.zeros(1, 2, 8, 6, 5),))


@pytest.mark.parametrize("message", [(), ("too low",)])
def test_a_check_of_values_is_refused(message: tuple[str, ...]) -> None:
    network = Call("check", lambda x: (torch._assert_async((x > -100).all(), *message), x * 2)[1])
    with pytest.raises(NotPartitionableError, match="_assert_async checks values"):
        SpatialPartitionInferer(2)(torch.zeros(1, 2, 8, 6, 5), network)


def test_a_gradient_of_torch_func_is_refused() -> None:
    """torch 2.14 captures the tensor as a constant, older releases stop in their own code."""
    network = nn.Sequential(nn.Identity(), Call("grad", lambda x: torch.func.grad(lambda z: (z**3).sum())(x)))
    (reason,) = explain(network, (1, 2, 8, 6, 5))
    assert reason.startswith("1 (Call), /") or "torch.export fails on it" in reason
    assert "\n" not in reason


def test_probabilities_outside_of_0_to_1_are_an_error_as_in_torch() -> None:
    network = Call("drawn", lambda x: x * torch.bernoulli(x))
    SpatialPartitionInferer(2)(torch.full((1, 2, 8, 6, 5), 0.5), network)
    for number in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"Call, /.*: torch\.bernoulli takes probabilities from 0 to 1"):
            SpatialPartitionInferer(2)(torch.full((1, 2, 8, 6, 5), number), network)


@pytest.mark.parametrize("layer", [nn.LazyConv3d(2, 3), nn.LazyBatchNorm3d()], ids=str)
def test_lazy_layers_are_refused_until_they_know_their_size(layer: nn.Module) -> None:
    network, said = (
        nn.Sequential(nn.Identity(), layer),
        r"^1 \(Lazy.*\) does not know its size yet: run the network once",
    )
    for call in (
        lambda: SpatialPartitionInferer(2)(torch.zeros(1, 2, 8, 6, 5), network),
        lambda: verify(network, (1, 2, 8, 6, 5)),
        lambda: spatial_partition(network, init_mesh(spatial=(1,))),
    ):
        with pytest.raises(NotPartitionableError, match=said):
            call()
    network(torch.rand(1, 2, 8, 6, 5))
    assert explain(network, (1, 2, 8, 6, 5)) == []


@pytest.mark.parametrize("data", [True, False])
def test_a_parameter_that_forward_writes_is_named(data: bool) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = small_conv(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                (self.conv.weight.data if data else self.conv.weight).clamp_(-1, 1)
            return self.conv(x)

    (reason,) = explain(nn.Sequential(nn.Identity(), Clipped()), (1, 2, 8, 6, 5))
    assert reason.startswith("1 (Clipped), /")
    assert "test_refusals.py:" in reason
    assert "forward writes into the parameter '1.conv.weight'" in reason


OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "Unknown": Unknown,
    "set": lambda x: {x * 2},
    "generator": lambda x: (y for y in (x, x * 2)),
    "dtype": lambda x: (x * 2, x.dtype),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be_put_together(name: str) -> None:
    (reason,) = explain(Call(name, OUTPUTS[name]), (1, 2, 8, 6, 5))
    assert f"the output holds a {name}," in reason
    assert "register_dataclass" in reason


class Recurrent(nn.Module):
    """A recurrent layer over the voxels in the order of memory."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, x.shape[2:])


LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "GRU": (lambda: Recurrent(nn.GRU(2, 2, batch_first=True)), True),
    "LSTM both ways": (lambda: Recurrent(nn.LSTM(2, 1, batch_first=True, bidirectional=True)), False),
    "batch norm that averages": (lambda: nn.BatchNorm3d(2, momentum=None), True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.slow
def test_layers_that_only_seem_to_draw_or_to_read_a_number(name: str) -> None:
    made, train = LAYERS[name]
    network = nn.Sequential(small_conv(3), made(), small_conv(3)).double().train(train)
    x = torch.randn(1, 2, 5, 2, 2, dtype=torch.float64)
    assert try_settings(network, (x,), [(0, 3), (1, 2)]).exact == 2


def test_a_recurrent_layer_that_drops_in_training_is_refused() -> None:
    network = Recurrent(nn.GRU(2, 2, 2, batch_first=True, dropout=0.5)).train()
    (reason,) = explain(network, (1, 2, 4, 2, 1))
    assert "layer (GRU)" in reason
    assert "draws random numbers" in reason

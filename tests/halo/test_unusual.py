"""Code that hides from a capture, and inputs that are not plain volumes: exact, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from tests.halo.kinds import small_conv
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import clones, difference, plain, try_settings

SETTINGS = [(0, 3), (1, 2), (0, 100)]


def net() -> nn.Sequential:
    """Two convolutions around a norm."""
    return nn.Sequential(small_conv(3), nn.InstanceNorm3d(2, affine=True), nn.LeakyReLU(inplace=True), small_conv(3))


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (1, 2, 13, 7, 6), dtype=torch.float64)


def with_hook(register: Callable[[nn.Module], Any]) -> nn.Module:
    network = net()
    register(network)
    return network


def centered(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (args[0] - args[0].mean(),)


def flipped(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.flip(2) * output.shape[2]


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "root pre": lambda n: n.register_forward_pre_hook(centered),
    "root": lambda n: n.register_forward_hook(flipped),
    "root with keyword arguments": lambda n: n.register_forward_pre_hook(
        lambda m, args, kwargs: (centered(m, args), kwargs), with_kwargs=True
    ),
    "inner pre": lambda n: n[1].register_forward_pre_hook(centered),
    "inner": lambda n: n[0].register_forward_hook(flipped),
    "inner, called always": lambda n: n[2].register_forward_hook(flipped, always_call=True),
    "full backward": lambda n: n[0].register_full_backward_hook(lambda m, gi, go: None),
    "full backward pre": lambda n: n.register_full_backward_pre_hook(lambda m, go: None),
    "on the state": lambda n: n._register_state_dict_hook(lambda *a: None),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.slow
def test_hooks_act_as_in_a_plain_call(name: str) -> None:
    assert try_settings(with_hook(HOOKS[name]).double(), (x_of(),), SETTINGS).exact == 3


class Doubled(nn.Conv3d):
    """A subclass of a layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2 + x.mean()


class Cached(nn.Module):
    """Keeps a grid of the volume's size on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.grid: torch.Tensor | None = None
        self.conv = small_conv(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grid is None or self.grid.shape != x.shape[2:]:
            self.grid = torch.stack(
                torch.meshgrid(*[torch.arange(n, dtype=x.dtype) for n in x.shape[2:]], indexing="ij")
            ).sum(0)
        return self.conv(x * self.grid)


class Half(nn.Module):
    """Symmetric weights, as a parametrization."""

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return (w + w.flip(2)) / 2


def shared() -> nn.Module:
    conv = small_conv(3)
    return nn.Sequential(conv, nn.ReLU(), conv, nn.BatchNorm3d(2), conv)


def parametrized() -> nn.Module:
    network = net()
    parametrize.register_parametrization(network[0], "weight", Half())
    return network


def pruned() -> nn.Module:
    network = net()
    prune.random_unstructured(network[0], "weight", 0.5)
    return network


MADE: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: nn.Sequential(Doubled(2, 2, 3, padding=1), small_conv(3)),
    "shared layers": shared,
    "parametrization": parametrized,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(small_conv(3)), small_conv(3)),
    "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(small_conv(3)), small_conv(3)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(small_conv(3)), small_conv(3)),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(small_conv(3)), small_conv(3)),
    "pruning": pruned,
    "cached grid": Cached,
    "lazy layer": lambda: nn.Sequential(nn.LazyConv3d(2, 3, padding=1), small_conv(3)),
    "submodule of torch.compile": lambda: nn.Sequential(torch.compile(small_conv(3), backend="eager"), small_conv(3)),
    "module.compile": lambda: (lambda n: (n.compile(backend="eager"), n)[1])(net()),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.slow
def test_what_stands_between_layers_and_their_code(name: str) -> None:
    network = MADE[name]().double().eval()
    if name == "lazy layer":
        with torch.no_grad():
            network(x_of())
    kept = {k: v for k, v in network.__dict__.items() if k == "grid"}
    assert try_settings(network, (x_of(),), SETTINGS).exact == 3
    assert kept.keys() == {k for k in network.__dict__ if k == "grid"}


@pytest.mark.slow
def test_a_cached_grid_of_another_size_is_not_used() -> None:
    network = Cached().double()
    for shape in ((1, 2, 13, 7, 6), (1, 2, 10, 7, 6), (1, 2, 13, 7, 6)):
        assert try_settings(network, (x_of(*shape),), SETTINGS).exact == 3


def test_compiled_networks_run_their_plain_code() -> None:
    network, x = net().double(), x_of()
    got = SpatialPartitionInferer(3)(x, torch.compile(network, backend="eager"))
    assert difference(got, plain(network, (x,))) < 1e-12


@pytest.mark.parametrize("way", ["script", "trace"])
def test_torch_jit_modules_are_refused_by_name(way: str) -> None:
    made = (
        torch.jit.script(small_conv(3))
        if way == "script"
        else torch.jit.trace(small_conv(3), torch.zeros(1, 2, 5, 5, 5))
    )
    network = nn.Sequential(net(), made).double()
    with pytest.raises(NotPartitionableError, match=r"1 .*torch\.jit"):
        SpatialPartitionInferer(3)(x_of(), network)


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "empty batch": lambda: x_of(0, 2, 13, 7, 6),
    "one row": lambda: x_of(1, 2, 1, 7, 6),
    "channels last": lambda: x_of().contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda: x_of(1, 2, 6, 7, 13).transpose(2, 4),
    "expanded": lambda: x_of(1, 1, 1, 7, 6).expand(2, 2, 13, 7, 6),
    "strided": lambda: x_of(1, 2, 26, 7, 6)[:, :, ::2],
    "MetaTensor": lambda: MetaTensor(x_of()),
    "requires grad": lambda: x_of().requires_grad_(),
    "parameter": lambda: nn.Parameter(x_of()),
    "NaN": lambda: x_of().index_fill(2, torch.tensor([4]), float("nan")),
    "infinite": lambda: x_of().index_fill(2, torch.tensor([4]), float("inf")),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.slow
def test_inputs_that_are_no_plain_volumes(name: str) -> None:
    x, network = (
        INPUTS[name](),
        nn.Sequential(small_conv(3), nn.ReLU(), nn.BatchNorm3d(2), small_conv(3)).double().eval(),
    )
    with torch.no_grad():
        expected = network(x)
        for axis, parts in SETTINGS:
            got = SpatialPartitionInferer(parts, axis=axis)(x, network)
            assert isinstance(got, MetaTensor) == (name == "MetaTensor")
            assert not got.requires_grad
            assert difference(got.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor)) < 1e-12


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "all": lambda x: x.mul_(2) + 1,
    "rows": lambda x: (x[:, :, 3:5].zero_(), x + 1)[1],
    "returned": lambda x: x.add_(1),
    "flipped": lambda x: x.copy_(x.flip(2)),
    "views of it": lambda x: (x.transpose(2, 3).relu_(), x.mean())[1],
}


@pytest.mark.parametrize("name", EDITS)
def test_arguments_are_changed_as_the_network_changes_them(name: str) -> None:
    assert try_settings(Call(name, EDITS[name]), (x_of(),), SETTINGS).exact == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_autocast_and_half_networks(dtype: torch.dtype) -> None:
    x, network = x_of().float(), net()
    with torch.autocast("cpu", dtype), torch.no_grad():
        expected = network(x)
        got = SpatialPartitionInferer(3)(x, network)
    assert got.dtype == expected.dtype
    assert difference(got, expected) < 0.03
    half = clones(x).to(dtype)
    network = network.to(dtype)
    assert difference(SpatialPartitionInferer(3)(half, network), plain(network, (half,))) < 0.03


@pytest.mark.slow
def test_further_inputs_of_other_sizes() -> None:
    """Half-size thumbnails, prompts, lists and keyword arguments are spread in their own rows or read whole."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = small_conv(3), small_conv(3)

        def forward(self, x: torch.Tensor, small: torch.Tensor, scale: Any = None) -> Any:
            y = self.a(x) + F.interpolate(self.b(small), x.shape[2:], mode="trilinear")
            return y if scale is None else y * scale["by"][0] + scale["more"]

    network = Two().double()
    for shape in ((1, 2, 6, 4, 3), (1, 2, 13, 7, 6), (1, 2, 1, 1, 1), (1, 2, 26, 3, 3), (1, 2, 7, 13, 6)):
        assert try_settings(network, (x_of(), x_of(*shape)), SETTINGS).exact == 3
        scale = {"by": [x_of(1, 1, 1, 1, 6)], "more": 2}
        assert try_settings(network, (x_of(), x_of(*shape)), SETTINGS, {"scale": scale}).exact == 3


class Random(nn.Module):
    """Draws in forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.3, True) + torch.rand_like(x) + torch.randn(x.shape[2:], dtype=x.dtype) * 0.1


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU, Random])
@pytest.mark.long
def test_random_numbers_are_the_same_under_any_cut(layer: Callable[[], nn.Module]) -> None:
    network, x = nn.Sequential(small_conv(3), layer(), small_conv(3)).double().train(), x_of() + 1
    before = torch.get_rng_state()
    results = []
    for axis, parts in ((0, 1), (0, 3), (1, 2), (2, 6)):
        torch.manual_seed(3)
        results.append(SpatialPartitionInferer(parts, axis=axis)(x, network))
    torch.set_rng_state(before)
    for other in results[1:]:
        assert difference(other, results[0]) < 1e-12


def test_random_slopes_lie_between_their_bounds() -> None:
    x = torch.cat([-torch.ones(1, 1, 9, 8, 8), torch.ones(1, 1, 9, 8, 8)], 1)
    got = SpatialPartitionInferer(3)(x, nn.RReLU(0.2, 0.4).train())
    assert torch.equal(got[:, 1], x[:, 1])
    slopes = -got[:, 0]
    assert 0.2 <= slopes.min() < 0.22
    assert 0.38 < slopes.max() <= 0.4
    assert abs(float(slopes.mean()) - 0.3) < 0.01
    assert torch.allclose(SpatialPartitionInferer(3)(x, nn.RReLU(0.2, 0.4).eval())[:, 0], torch.full((), -0.3))

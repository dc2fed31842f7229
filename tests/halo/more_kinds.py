"""Random networks with hooks, with further inputs, and that draw random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from tests.halo.kinds import LAYERS, Case, chain, dims_of, layer, settings_of, small_conv, volume
from tests.halo.ordinary_code import C, Call, Draw, number, pick

Hook = Callable[..., Any]


def centered(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The input less its mean."""
    return (args[0] - args[0].mean(), *args[1:])


def with_keywords(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The same as a hook that sees keyword arguments."""
    return centered(module, args), kwargs


def turned(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    """The output flipped and scaled by its size."""
    return output.flip(2) * output.shape[2] ** -0.5


def shifted(_module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """The output rolled, changed by the largest input."""
    return output.roll(1, 2) + args[0].amax()


REGISTER: dict[str, Callable[[nn.Module], Any]] = {
    "pre": lambda m: m.register_forward_pre_hook(centered),
    "pre with keywords": lambda m: m.register_forward_pre_hook(with_keywords, with_kwargs=True),
    "post": lambda m: m.register_forward_hook(turned),
    "post, first": lambda m: m.register_forward_hook(shifted, prepend=True),
    "post, always": lambda m: m.register_forward_hook(turned, always_call=True),
    "post with keywords": lambda m: m.register_forward_hook(
        lambda module, args, kwargs, output: turned(module, args, output), with_kwargs=True
    ),
    "full backward": lambda m: m.register_full_backward_hook(lambda module, gi, go: None),
}


def scaled_weight(network: nn.Module, draw: Draw) -> None:
    """A parametrization on one convolution, if there is one."""
    found = [m for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    if found and pick(draw, True, False):
        way = pick(draw, parametrizations.weight_norm, parametrizations.spectral_norm)
        way(pick(draw, *found))


@st.composite
def hooked(draw: Draw, count: int = 10) -> Case:
    """A chain of layers with hooks on the root and inside, shared layers, parametrizations."""
    n = dims_of(draw)
    torch.manual_seed(number(draw, 0, 2**16))
    network = chain(draw, n, draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=2)))
    shared = small_conv(n)
    network = nn.Sequential(shared, network, pick(draw, shared, small_conv(n)))
    scaled_weight(network, draw)
    for _ in range(number(draw, 1, 3)):
        REGISTER[pick(draw, *REGISTER)](pick(draw, network, network[0], network[1], network[2]))
    return network.double().eval(), (volume(draw, n),), settings_of(draw, n, count)


class Two(nn.Module):
    """A volume and something else, joined in one of many ways."""

    def __init__(self, n: int, join: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.join = small_conv(n), small_conv(n), small_conv(n), join

    def forward(self, x: torch.Tensor, y: torch.Tensor, more: Any = None) -> Any:
        """The joined volume, and the second input's mean."""
        x = self.a(x)
        joined = self.c(JOIN[self.join](self, x, y))
        return joined if more is None else {"joined": joined * more["by"][0], "mean": (y.mean(), more["word"])}


def _weights(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kernel = y.mean(0).flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1)).expand(C, C, *[3] * (x.dim() - 2))
    return [F.conv1d, F.conv2d, F.conv3d][x.dim() - 3](x, kernel, padding=1)


JOIN: dict[str, Callable[[Two, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "resized": lambda net, x, y: x + F.interpolate(net.b(y), x.shape[2:]),
    "first resized": lambda net, x, y: F.interpolate(x, y.shape[2:]) * y[:1],
    "broadcast pooled": lambda net, x, y: x * y.mean(dim=list(range(2, y.dim())), keepdim=True)[:1],
    "weights": lambda net, x, y: _weights(x, y),
    "its profile": lambda net, x, y: x + F.interpolate(y.mean(1, keepdim=True)[:1], x.shape[2:]).cumsum(2),
    "its size": lambda net, x, y: x[:, :, : max(1, min(x.shape[2], y.shape[2]))] * y.shape[-1],
    "side by side": lambda net, x, y: torch.cat([x, F.interpolate(y[:1], x.shape[2:]).expand_as(x)], 2),
}


@st.composite
def several(draw: Draw, count: int = 10) -> Case:
    """Two volumes of any sizes, equal ones and single rows among them."""
    n = dims_of(draw)
    torch.manual_seed(number(draw, 0, 2**16))
    x = volume(draw, n)
    alike = pick(draw, "same", "half", "one", "any", "swapped")
    sizes = {
        "same": x.shape[2:],
        "half": [max(1, s // 2) for s in x.shape[2:]],
        "one": [1] * n,
        "any": [number(draw, 1, 19) for _ in range(n)],
        "swapped": list(reversed(x.shape[2:])),
    }[alike]
    y = torch.randn(x.shape[0], C, *sizes, dtype=torch.float64)
    return Two(n, pick(draw, *JOIN)).double().eval(), (x, y), settings_of(draw, n, count)


class StochasticDepth(nn.Module):
    """Leaves out a branch, for every sample by itself, as networks spell it."""

    def __init__(self, way: str, n: int) -> None:
        super().__init__()
        self.way, self.branch = way, small_conv(n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input and perhaps its branch."""
        shape = (x.shape[0], *[1] * (x.dim() - 1))
        masks = {
            "bernoulli": lambda: x.new_empty(shape).bernoulli_(0.6),
            "floor": lambda: (0.6 + torch.rand(shape, dtype=x.dtype)).floor(),
            "less": lambda: (torch.rand(shape) < 0.6).to(x.dtype),
            "probabilities": lambda: torch.bernoulli(torch.full(shape, 0.6, dtype=x.dtype)),
        }
        return x + self.branch(x) * masks[self.way]() / 0.6


DRAWS: dict[str, Callable[[Draw, int], nn.Module]] = {
    "dropout": lambda draw, n: nn.Dropout(pick(draw, 0.1, 0.5, 1.0)),
    "dropout of channels": lambda draw, n: layer("Dropout", n)(pick(draw, 0.1, 0.5)),
    "alpha dropout": lambda draw, n: nn.AlphaDropout(0.3),
    "feature alpha dropout": lambda draw, n: nn.FeatureAlphaDropout(0.3),
    "random slopes": lambda draw, n: nn.RReLU(),
    "stochastic depth": lambda draw, n: StochasticDepth(pick(draw, "bernoulli", "floor", "less", "probabilities"), n),
    "noise": lambda draw, n: Call("noise", lambda x: x + torch.randn_like(x) * 0.1),
    "noise of rows": lambda draw, n: Call(
        "rows", lambda x: x * torch.rand(x.shape[2], dtype=x.dtype).view(-1, *[1] * (n - 1))
    ),
    "normal": lambda draw, n: Call("normal", lambda x: x + torch.empty_like(x).normal_(1.0, 0.2)),
    "uniform": lambda draw, n: Call("uniform", lambda x: x * torch.empty_like(x).uniform_(0.5, 2.0)),
    "functional": lambda draw, n: Call(
        "functional", lambda x: F.dropout(torch.feature_dropout(x, 0.2, True), 0.2, True)
    ),
    "exponential": lambda draw, n: Call("gumbel", lambda x: F.gumbel_softmax(x, dim=1)),
    "integers": lambda draw, n: Call("integers", lambda x: x + torch.randint(0, 3, (x.shape[2],))[0]),
    "permutation": lambda draw, n: Call("permutation", lambda x: x[:, :, torch.randperm(x.shape[2])]),
}


@st.composite
def drawing(draw: Draw, count: int = 5) -> Case:
    """Networks in training mode that draw random numbers, several times."""
    n = dims_of(draw)
    torch.manual_seed(number(draw, 0, 2**16))
    names = draw(st.lists(st.sampled_from(sorted(DRAWS)), min_size=1, max_size=2))
    parts = [part for name in names for part in (small_conv(n), DRAWS[name](draw, n))]
    network = nn.Sequential(*parts, layer("InstanceNorm", n)(C), small_conv(n))
    return network.double().train(), (volume(draw, n),), settings_of(draw, n, count)

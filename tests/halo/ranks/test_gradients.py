"""Code that stops, changes or reads gradients: in parts they are those of the whole, or the network is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import MemoryEfficientSwish
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer, init_mesh, spatial_partition
from monai_memeff.memory.checkpoint import checkpoint as once
from tests.halo.ranks.compare import errors_of

Code = Callable[["Coded", torch.Tensor], Any]


class Coded(nn.Module):
    """Two convolutions that a function uses."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.a, self.b, self.code = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 2, 3, padding=1), code
        self.register_buffer("mean", torch.zeros(2))
        self.norm = nn.BatchNorm3d(2, affine=False)
        self.loose = [nn.Parameter(torch.ones(1, dtype=torch.float64))]

    def forward(self, x: torch.Tensor) -> Any:
        return self.code(self, x)

    @torch.no_grad()
    def frozen(self, x: torch.Tensor) -> torch.Tensor:
        """The second convolution without gradients."""
        return self.b(x)


class Reversed(torch.autograd.Function):
    """Turns gradients around."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


stored = Reversed.apply


def made(code: Code) -> nn.Module:
    """The network with the same weights each time."""
    torch.manual_seed(0)
    return Coded(code).double()


def volume() -> torch.Tensor:
    return torch.randn(1, 1, 7, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def nested(n: Coded, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = n.a(x)
        with torch.enable_grad():
            z = n.b(n.a(x))
        w = z * 2
    return z + y + w


def several(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    with torch.no_grad():
        (most, which), (first, second) = y.max(1, keepdim=True), y.chunk(2, 1)
    return n.b(y) * most + first * y + (which + second)


def switched(n: Coded, x: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(False)
    y = n.a(x)
    torch.set_grad_enabled(True)
    return n.b(y)


def statistics(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    with torch.no_grad():
        n.mean.mul_(0.9).add_(y.mean((0, 2, 3, 4)), alpha=0.1)
        same = F.instance_norm(y)
    return F.instance_norm(y) * n.mean.view(1, 2, 1, 1, 1) + n.b(same)


def written(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x).expand(1, 2, *x.shape[2:]).clone()
    with torch.no_grad():
        y[:, :1] = n.a(x)[:, :1]
    y[:, 1:] = n.a(x)[:, 1:]
    return n.b(y)


def straight(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    return n.b(y + (y.round() - y).detach())


def detached_in_place(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x) * 2
    y.detach_()
    return n.b(y)


def penalty(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return n.b(y) + g


def branched(reads: Callable[[Coded, torch.Tensor], bool]) -> Code:
    return lambda n, x: n.b(n.a(x)) * (2 if reads(n, x) else 3)


EXACT: dict[str, Code] = {
    "enable_grad": nested,
    "set_grad_enabled": switched,
    "decorated": lambda n, x: n.b(n.frozen(n.a(x))) + n.a(x),
    "several results": several,
    "a buffer and a norm that is used twice": statistics,
    "written with and without": written,
    "detach": lambda n, x: (n.b(n.a(x).clone().detach().clone()) + n.a(x), n.a(x).detach()),
    "data": lambda n, x: n.b(n.a(x).data) + n.a(x),
    "a leaf of its own": lambda n, x: n.b(n.a(x).detach().requires_grad_()),
    "detach_": detached_in_place,
    "straight through": straight,
    "detached weight": lambda n, x: n.b(F.conv3d(x, n.a.weight.detach(), n.a.bias, padding=1)),
    "a function where nothing has a gradient": lambda n, x: n.b(n.a(x)) + Reversed.apply(n.a(x).detach()),
    "a gradient in forward": penalty,
    "reentrant checkpoint": lambda n, x: n.b(checkpoint(n.frozen, checkpoint(n.a, x, use_reentrant=True) * 1,
                                                        use_reentrant=False)) + checkpoint(n.a, x, use_reentrant=True),
    "statistics under our own checkpoint": lambda n, x: n.b(once(lambda y: once(n.norm, n.a(y)) * 2, x)),
    "reentrant checkpoint of what wants none": lambda n, x: n.b(checkpoint(n.a, x.detach(), use_reentrant=True)),
    "is_grad_enabled": branched(lambda n, x: torch.is_grad_enabled()),
    "requires_grad": branched(lambda n, x: n.a(x).requires_grad and x.requires_grad and n.a.weight.requires_grad),
    "is_compiling": branched(lambda n, x: torch.compiler.is_compiling()),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.slow
def test_gradients_are_those_of_the_whole(name: str) -> None:
    assert max(errors_of(made(EXACT[name]), [volume()], (3,)).values()) < 1e-10


@pytest.mark.parametrize("name", ["a buffer and a norm that is used twice", "enable_grad"])
def test_gradients_are_those_of_the_whole_in_segments(name: str) -> None:
    assert max(errors_of(made(EXACT[name]), [volume()], (3,), checkpoint_segments=2).values()) < 1e-10


UNLINKED: dict[str, Code] = {
    "no_grad": statistics,
    "detach": lambda n, x: n.b(F.instance_norm(n.a(x)).detach()),
    "zeros_like": lambda n, x: n.a(x) + torch.zeros_like(F.instance_norm(n.b(n.a(x)))),
}


@pytest.mark.parametrize("name", UNLINKED)
@pytest.mark.slow
def test_ranks_without_rows_do_not_wait_for_gradients_that_nobody_has(name: str) -> None:
    assert max(errors_of(made(UNLINKED[name]), [volume()], (9,)).values()) < 1e-10


def hooked(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    y.register_hook(lambda g: 3 * g)
    return n.b(y)


def kept(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    y.retain_grad()
    return n.b(y)


def packed(n: Coded, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return n.b(n.a(x).square())


def inferred(n: Coded, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        y = n.a(x)
    return n.b(n.a(x)) + y


def past_autograd(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    y.detach().mul_(2)
    return n.b(y)


def without_gradients(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    with torch.no_grad():
        y.mul_(2)
    return n.b(y)


def a_constant_gradient(n: Coded, x: torch.Tensor) -> torch.Tensor:
    z = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(n.a(z).square().sum(), z)
    return n.b(n.a(x)) + g


def freezing(n: Coded, x: torch.Tensor) -> torch.Tensor:
    n.a.weight.requires_grad_(False)
    return n.b(n.a(x))


def normalizing(n: Coded, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        n.a.weight.mul_(0.9)
    return n.b(n.a(x))


def leaving(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.b(n.a(x))
    torch.set_grad_enabled(False)
    return y


def counting(n: Coded, x: torch.Tensor) -> torch.Tensor:
    y = n.a(x)
    n.mean.mul_(0.9).add_(y.detach().mean((0, 2, 3, 4)))
    return n.b(y)


LINE = r"test_gradients\.py:\d+: "
REFUSED: dict[str, tuple[Code, str]] = {
    "a function": (lambda n, x: n.b(Reversed.apply(n.a(x))), LINE + "Reversed has a backward of its own"),
    "a stored function": (lambda n, x: n.b(stored(n.a(x))), LINE + "Reversed has a backward of its own"),
    "hook": (hooked, LINE + "forward puts a hook on a tensor's gradient"),
    "retain_grad": (kept, LINE + "forward keeps the gradient of a tensor"),
    "grad_fn": (branched(lambda n, x: n.a(x).grad_fn is None), LINE + "forward reads `grad_fn`"),
    "is_leaf": (branched(lambda n, x: x.is_leaf), LINE + "forward reads `is_leaf`"),
    "grad": (branched(lambda n, x: n.a.weight.grad is None), LINE + "forward reads `grad`"),
    "saved_tensors_hooks": (packed, LINE + "forward changes what autograd saves"),
    "inference_mode": (inferred, LINE + r"forward enters torch\.inference_mode"),
    "a write past autograd": (past_autograd, LINE + "forward writes, past autograd, into memory"),
    "a write without gradients": (without_gradients, r"b \(Conv3d\).*gradients take another way"),
    "a parameter of no module": (lambda n, x: n.b(n.a(x)) * n.loose[0], "gradients take another way"),
    "a constant gradient": (a_constant_gradient, "gradients take another way"),
    "a parameter frozen in forward": (freezing, r"a \(Conv3d\).*let forward leave requires_grad as it is"),
    "a parameter written in forward": (normalizing, LINE + r"forward writes, past autograd, into 'a\.weight'"),
    "a buffer under a checkpoint": (
        lambda n, x: checkpoint(counting, n, x, use_reentrant=False),
        LINE + r"forward writes the buffer 'mean' under torch\.utils\.checkpoint",
    ),
    "a buffer under our own checkpoint": (
        lambda n, x: once(counting, n, x),
        LINE + r"forward writes the buffer 'mean' under torch\.utils\.checkpoint",
    ),
    "a norm under torch's checkpoint in ours": (
        lambda n, x: once(lambda y: checkpoint(n.norm, y, use_reentrant=False), n.a(x)),
        LINE + r"forward writes the buffer 'norm\.\w+' under torch\.utils\.checkpoint",
    ),
    "a buffer under a reentrant checkpoint": (
        lambda n, x: checkpoint(counting, n, x, use_reentrant=True),
        LINE + r"forward writes the buffer 'mean' under torch\.utils\.checkpoint",
    ),
    "gradients left disabled": (leaving, "leaves gradients disabled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_other_gradients_is_refused_before_it_runs(name: str) -> None:
    code, said = REFUSED[name]
    network = spatial_partition(made(code), init_mesh(spatial=(1,)))
    with pytest.raises(NotPartitionableError, match=said):
        network(volume().requires_grad_())
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_a_torch_whose_export_loses_gradient_mode_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_memeff.halo.planning.capture._TORCH", TorchVersion("2.8.0+cpu"))
    whole, volume = nn.Conv3d(1, 2, 3, padding=1), torch.randn(1, 1, 4, 3, 5)
    network = spatial_partition(copy.deepcopy(whole), init_mesh(spatial=(1,)))
    with pytest.raises(NotPartitionableError, match=r"needs torch 2\.9 or newer, .* torch is 2\.8\.0\+cpu: update"):
        network(volume)
    with torch.no_grad():
        torch.testing.assert_close(network(volume), whole(volume))


def test_hooks_on_gradients_are_refused_whenever_they_come() -> None:
    network = spatial_partition(made(lambda n, x: n.b(n.a(x))), init_mesh(spatial=(1,)))
    network(volume())
    for module, register in ((network, "register_full_backward_pre_hook"), (network.b, "register_full_backward_hook")):
        hook = getattr(module, register)(lambda *_: None)
        with pytest.raises(NotPartitionableError, match="has a backward hook"):
            network(volume())
        hook.remove()
    hook = network.a.weight.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(NotPartitionableError, match=r"parameter 'a\.weight' has a hook"):
        network(volume())
    with torch.no_grad():
        network(volume())
    hook.remove()
    network(volume()).sum().backward()


@pytest.mark.slow
def test_parameters_may_be_frozen_before_and_between_calls() -> None:
    frozen = made(branched(lambda n, x: n.a.weight.requires_grad))
    frozen.a.weight.requires_grad_(False)
    assert max(errors_of(frozen, [volume()], (3,)).values()) < 1e-10
    network = spatial_partition(made(branched(lambda n, x: n.a.weight.requires_grad)), init_mesh(spatial=(1,)))
    plain = made(network.code)
    for wanted in (True, False):
        for other in (network, plain):
            other.a.weight.requires_grad_(wanted)
            other.zero_grad()
        found, expected = network(volume()), plain(volume())
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
        assert (network.a.weight.grad is None) == (plain.a.weight.grad is None) == (not wanted)
        torch.testing.assert_close(network.b.weight.grad, plain.b.weight.grad)


def test_weights_that_are_normalized_without_gradients() -> None:
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv3d(2, 2, 3, padding=1))
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), MemoryEfficientSwish(), conv).double()
    assert max(errors_of(network, [volume()], (3,)).values()) < 1e-10


def test_a_teacher_in_the_network() -> None:
    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2), nn.ReLU())
            self.teacher = copy.deepcopy(self.student)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x) * target

    torch.manual_seed(0)
    assert max(errors_of(Taught().double(), [volume()], (3,)).values()) < 1e-10


def test_a_region_without_gradients_under_autocast() -> None:
    """torch.export forgets a region inside of one with autocast, but not one around or under the caller's."""
    network = made(lambda n, x: n.b(n.frozen(n.a(x))) + n.a(x))
    with torch.autocast("cpu", torch.bfloat16):
        spatial_partition(network, init_mesh(spatial=(1,)))(volume()).sum().backward()
    assert network.b.weight.grad is not None
    inner = made(lambda n, x: torch.autocast("cpu", torch.bfloat16)(lambda: n.b(n.frozen(n.a(x))) + n.a(x))())
    with pytest.raises(NotPartitionableError, match="gradients take another way"):
        spatial_partition(inner, init_mesh(spatial=(1,)))(volume())


@pytest.mark.slow
def test_streaming_reads_gradient_state_as_without_gradients() -> None:
    for name in ("grad_fn", "is_leaf", "hook"):
        code = REFUSED[name][0] if name != "hook" else EXACT["is_grad_enabled"]
        network = made(code)
        with torch.no_grad():
            expected = network(volume())
        torch.testing.assert_close(SpatialPartitionInferer(3)(volume(), network), expected)


class Extreme(nn.Module):
    """Weighs a volume by what a function makes of it."""

    def __init__(self, code: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.code = nn.Parameter(torch.ones(1)), code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.code(x * self.weight)
        y = F.interpolate(y, x.shape[2:]) if y.dim() == 5 else y
        return y * torch.arange(x.numel(), dtype=x.dtype).view(x.shape) + x * self.weight


EXTREMES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max": lambda x: x.max(),
    "amin": lambda x: x.amin((2, 3, 4), keepdim=True),
    "along one dimension": lambda x: x.amax(2, keepdim=True),
    "with places": lambda x: x.max(2, keepdim=True)[0],
    "largest magnitude": lambda x: torch.linalg.vector_norm(x - 0.5, float("inf")),
    "pooled to one": lambda x: F.adaptive_max_pool3d(x, 1),
    "pooled to a plane": lambda x: F.adaptive_max_pool3d(x, (1, 2, 2)),
    "pooled to a line": lambda x: F.adaptive_max_pool3d(x, (3, 1, 1)),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.slow
def test_equal_extremes_share_a_gradient_as_in_the_whole(name: str) -> None:
    x = torch.randint(0, 2, (2, 2, 7, 6, 5), generator=torch.Generator().manual_seed(5)).double()
    x[0, 0] = 0
    for mesh, axes in (((3,), (0,)), ((2, 2), (0, 2))):
        assert max(errors_of(Extreme(EXTREMES[name]).double(), [x], mesh, axes).values()) < 1e-10


def test_an_output_that_only_some_axes_cut_has_no_gradient() -> None:
    network, x = made(lambda n, x: n.b(n.a(x)).mean(2, keepdim=True)), volume()
    with pytest.raises(NotPartitionableError, match="cut along some axes of the mesh and the same along others"):
        errors_of(network, [x], (2, 2), (0, 1))


def beside(x: torch.Tensor, value: float) -> torch.Tensor:
    """A volume with one value in most of its rows."""
    return torch.where(torch.arange(7).view(-1, 1, 1) < 3, x, value)


EDGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "norm of zeros": lambda x: (x * 0).norm(),
    "norm of zeros and others": lambda x: torch.linalg.vector_norm(beside(x, 0.0), 3, (2, 3, 4), True),
    "deviation of one value": lambda x: (x * 0).std((2, 3, 4), keepdim=True),
    "logsumexp": lambda x: beside(x, float("-inf")).logsumexp((2, 3, 4), keepdim=True),
    "layer norm over the volume": lambda x: F.layer_norm(x * x, x.shape[2:]),
    "layer norm, and its weight": lambda x: F.layer_norm(beside(x, 1.0), x.shape[2:], x[0, 0] * 0 + 2),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.slow
def test_gradients_where_values_are_zero_or_infinite(name: str) -> None:
    x = torch.rand(1, 1, 7, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.5
    assert max(errors_of(Extreme(EDGES[name]).double(), [x], (3,)).values()) < 1e-10
    assert max(errors_of(Extreme(EDGES[name]).double(), [x], (2, 2), (0, 1)).values()) < 1e-10

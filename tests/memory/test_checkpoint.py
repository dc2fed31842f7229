"""Checkpointing changes neither results nor gradients nor running statistics, and takes less memory."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from monai_memeff.memory import checkpoint, measure_peak

Call = Callable[[nn.Module, Tensor], Tensor]


def chain(blocks: int = 9, channels: int = 3, dropout: float = 0.0) -> nn.Sequential:
    """Blocks of convolution, batch norm and activation in float64, every parameter different from its default."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(
            nn.Conv3d(channels, channels, 3, padding=1),
            nn.BatchNorm3d(channels, momentum=None if index % 2 else 0.3),
            nn.Dropout(dropout),
            nn.Sigmoid(),
        )
        for index in range(blocks)
    ]
    net = nn.Sequential(*layers).double()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.7, 0.9)
    return net


def image() -> Tensor:
    """A small volume with odd, unequal extents."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 5, 6, 7, generator=generator, dtype=torch.float64)


def run(net: nn.Module, call: Call) -> dict[str, Tensor]:
    """Output, gradients and buffers after one step of a copy of the network."""
    net, x = copy.deepcopy(net), image().requires_grad_()
    torch.manual_seed(2)
    y = call(net, x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {"output": y.detach(), "input gradient": x.grad}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in net.named_parameters()}
    return found | {f"buffer {name}": buffer.clone() for name, buffer in net.named_buffers()}


def assert_identical(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Bit by bit: the same operations ran on the same numbers."""
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        assert torch.equal(ours[name], expected), name


WAYS: dict[str, Call] = {
    "module": lambda net, x: checkpoint(net, x),
    "closure": lambda net, x: checkpoint(lambda y: net(y), x),
    "nested": lambda net, x: checkpoint(lambda y: checkpoint(net[4:], checkpoint(net[:4], y)), x),
    "layer by layer": lambda net, x: functools.reduce(lambda y, part: checkpoint(part, y), net, x),
}


@pytest.mark.parametrize("way", WAYS, ids=list(WAYS))
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
def test_same_as_the_plain_call(way: str, dropout: float) -> None:
    net = chain(dropout=dropout)
    assert_identical(run(net, WAYS[way]), run(net, lambda net, x: net(x)))


def test_without_the_guard_statistics_move_twice() -> None:
    """The guard is needed: torch's own behavior differs, in the buffers alone."""
    net = chain(1)
    plain = run(net, lambda net, x: net(x))
    twice = run(net, lambda net, x: checkpoint(net, x, batch_norm_once=False))
    assert int(twice["buffer 0.1.num_batches_tracked"]) == 2
    assert not torch.equal(twice["buffer 0.1.running_mean"], plain["buffer 0.1.running_mean"])
    assert torch.equal(twice["input gradient"], plain["input gradient"])


def test_evaluation_mode_uses_the_running_statistics() -> None:
    net = chain(3)
    net(image())
    net.eval()
    assert_identical(run(net, WAYS["module"]), run(net, lambda net, x: net(x)))


def test_two_backward_passes_through_one_graph() -> None:
    net, x = chain(2), image().requires_grad_()
    y = checkpoint(net, x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    assert int(net[0][1].num_batches_tracked) == 1


def test_buffers_stay_the_modules_own() -> None:
    net, x = chain(1), image().requires_grad_()
    buffers = {name: id(buffer) for name, buffer in net.named_buffers()}
    checkpoint(net, x).sum().backward()
    assert buffers == {name: id(buffer) for name, buffer in net.named_buffers()}
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_network_of_another_thread_keeps_its_statistics() -> None:
    """What another thread trains during the second pass counts its own passes."""
    net, other, x, calls = chain(1), nn.BatchNorm3d(3).double(), image().requires_grad_(), []

    def meanwhile(y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            thread = threading.Thread(target=other, args=(image(),))
            thread.start()
            thread.join()
        return net(y)

    checkpoint(meanwhile, x).sum().backward()
    assert len(calls) == 2
    assert int(other.num_batches_tracked) == 1
    assert int(net[0][1].num_batches_tracked) == 1


def test_a_failing_recomputation_puts_the_buffers_back() -> None:
    net, x, calls = chain(1), image().requires_grad_(), []

    def fail_the_second_time(y: Tensor) -> Tensor:
        calls.append(1)
        y = net(y)
        if len(calls) == 2:
            raise ZeroDivisionError
        return y.exp()

    y = checkpoint(fail_the_second_time, x)
    buffer = net[0][1].running_mean
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert net[0][1].running_mean is buffer
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_under_autocast() -> None:
    def mixed(call: Call) -> Call:
        def wrapped(net: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return call(net.float(), x.float()).double()

        return wrapped

    net = chain(2)
    assert_identical(run(net, mixed(WAYS["module"])), run(net, mixed(lambda net, x: net(x))))


def test_arguments_pass_as_they_are() -> None:
    x = image().requires_grad_()
    y, name = checkpoint(lambda a, scale, names: (a.exp() * scale, names[0]), x, 2.0, ["kept"])
    y.sum().backward()
    assert name == "kept"
    assert torch.equal(x.grad, 2 * x.detach().exp())


def test_without_gradients_the_function_is_just_called() -> None:
    calls = []
    with torch.no_grad():
        assert checkpoint(lambda x: calls.append(1) or x + 1, torch.ones(2)).tolist() == [2.0, 2.0]
    assert calls == [1]


@pytest.mark.slow
def test_less_memory_than_remembering() -> None:
    net, x = chain(16).float(), torch.rand(1, 3, 16, 16, 16, requires_grad=True)
    four = lambda y: functools.reduce(lambda z, i: checkpoint(net[i : i + 4], z), (0, 4, 8), y)  # noqa: E731
    peaks = {}
    for name, call in {"plain": lambda: net(x), "in 4": lambda: net[12:](four(x))}.items():
        with measure_peak() as meter:
            call().sum().backward()
        peaks[name] = meter.peak_bytes
    assert peaks["in 4"] < 0.55 * peaks["plain"], peaks


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="older torch runs this part uncompiled"
)
@pytest.mark.slow
def test_compiled_code_keeps_its_statistics_too() -> None:
    net = chain(1)
    compiled = torch.compile(lambda x: checkpoint(net, x), backend="aot_eager")
    compiled(image().requires_grad_()).sum().backward()
    assert int(net[0][1].num_batches_tracked) == 1


def test_statistics_of_another_thread_in_the_second_pass_are_kept() -> None:
    norm, passes = nn.BatchNorm1d(2), list[int]()
    twin, first, second = copy.deepcopy(norm), torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)

    def function(x: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        y = norm(x)
        if len(passes) == 2:
            thread = threading.Thread(target=norm, args=(second,))
            thread.start()
            thread.join()
        return y * y  # torch ends the second pass where nothing is left to be saved

    checkpoint(function, first).square().sum().backward()
    twin(first), twin(second)
    torch.testing.assert_close(norm.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert type(norm._buffers) is dict

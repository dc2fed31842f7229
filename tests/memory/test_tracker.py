"""The tracker in training steps: against hand counts, a walk over the autograd graph and the allocator's own log."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from monai_memeff.memory import measure_peak
from tests.memory.test_meter import KIB, kib


@pytest.mark.slow
def test_gradients_of_an_earlier_step_are_older_tensors() -> None:
    layer = nn.Linear(32, 32, bias=False)
    layer(torch.ones(1, 32)).sum().backward()
    with measure_peak() as meter:
        layer.weight.grad = None
    assert meter.live_bytes == -4 * KIB


@pytest.mark.slow
def test_activations_of_an_earlier_forward_pass_are_older_tensors() -> None:
    x = kib(4).requires_grad_()
    loss = x.exp().sin().sum()  # the graph holds exp's result twice over: 4 KiB once
    with measure_peak() as meter:
        loss.backward()
    # Gradients of sum (expanded, no bytes), sin, exp: sin's result is cos(u) and its product; what remains is x.grad.
    assert meter.live_bytes == x.grad.nbytes - 4 * KIB


@pytest.mark.slow
def test_a_matmul_chain_forward_and_backward() -> None:
    size = 32  # one matrix of 32 x 32 float32 is 4 KiB
    x, a, b = (torch.rand(size, size) for _ in range(3))
    a.requires_grad_()
    b.requires_grad_()
    with measure_peak() as meter:
        hidden = x @ a  # 1, saved for b's gradient
        out = hidden @ b  # 2
        out.backward(torch.ones_like(out))  # 3 with ones; + b.grad = 4; + gradient of hidden = 5; + a.grad = 6
    assert meter.peak_bytes == 6 * 4 * KIB
    assert meter.live_bytes == 4 * 4 * KIB  # hidden, out and two gradients; the ones and the inner gradient are gone


class SquareByHand(torch.autograd.Function):
    """x^2 with a wasteful backward pass that the meter must see."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        waste = torch.zeros(16 * KIB // 4)
        return 2 * x * gradient + waste.sum()


@pytest.mark.slow
def test_temporaries_of_a_custom_backward_pass() -> None:
    x = kib(1).requires_grad_()
    y = SquareByHand.apply(x)
    seed = torch.ones_like(y)
    with measure_peak() as meter:
        y.backward(seed)
    # The waste, 2 x, 2 x g, the sum of the waste (4 bytes) and the result.
    assert 16 * KIB < meter.peak_bytes <= (16 + 3) * KIB + 4
    assert meter.live_bytes == 1 * KIB


class ScaleByTable(torch.autograd.Function):
    """Twice x, which saves a tensor that only the graph knows and keeps another as an attribute."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x * 2)
        ctx.table = {"rows": [kib(3)]}
        return x * 2

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


@pytest.mark.slow
def test_what_a_custom_function_keeps() -> None:
    x = kib(1).requires_grad_()
    with measure_peak() as meter:
        loss = ScaleByTable.apply(x).sum()
        gc.collect()
        assert meter.live_bytes == (1 + 3) * KIB + 4, "the saved tensor, the table and the loss"
        loss.backward()
        gc.collect()
        assert meter.live_bytes == (1 + 3) * KIB + 4, "the gradient, the table and the loss"
        del loss
        assert meter.live_bytes == 1 * KIB


@pytest.mark.slow
def test_what_an_earlier_step_kept_lowers_the_level() -> None:
    """After backward the old graph still has its table, until the old loss goes: 3 KiB less than before."""
    x = kib(1).requires_grad_()
    loss = ScaleByTable.apply(x).sum()
    loss.backward()
    with measure_peak() as meter:
        new = ScaleByTable.apply(x).sum()
        assert meter.live_bytes == (1 + 3) * KIB + 4
        del loss
        assert meter.live_bytes == 1 * KIB
    assert new.numel() == 1


@pytest.mark.parametrize("keeper", ["tensor", "graph"])
@pytest.mark.slow
def test_storages_in_circles_of_garbage(keeper: str) -> None:
    """In torch 2.6 the garbage collector ends their weak references, although tensor or graph keep them alive."""
    with measure_peak() as meter:
        x = kib(4).requires_grad_()
        y = x.exp().sin()
        circle: list[object] = [(y if keeper == "tensor" else y.grad_fn._saved_self).untyped_storage()]
        circle.append(circle)
        del circle
        gc.collect()
        assert meter.live_bytes == 3 * 4 * KIB
        with torch.no_grad():
            _ = x + y
        assert meter.live_bytes == meter.peak_bytes == 4 * 4 * KIB
        del _, y
        assert meter.live_bytes == 4 * KIB
    assert meter.live_bytes == 4 * KIB
    assert meter.peak_bytes == 4 * 4 * KIB


@pytest.mark.slow
def test_recomputation_is_seen() -> None:
    x = kib(4).requires_grad_()
    chain = nn.Sequential(nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid())
    peaks = []
    for call in (chain, lambda x: checkpoint(chain, x, use_reentrant=False)):
        x.grad = None
        with measure_peak() as meter:
            out = call(x)
            held = meter.live_bytes
            out.sum().backward()
        peaks.append((held, meter.peak_bytes))
        del out
    assert peaks[0][0] == 4 * 4 * KIB
    # The meter sees the last activation alone after the forward pass, and the others come back in the backward pass.
    assert 4 * KIB <= peaks[1][0] < 5 * KIB + torch.get_rng_state().nbytes
    assert peaks[1][1] >= 4 * 4 * KIB


@pytest.mark.usefixtures("no_collector")
@pytest.mark.slow
def test_agrees_with_a_walk_over_the_graph() -> None:
    """Live bytes after every part of a training step: what Python knows and what the graph has saved, no more."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3), nn.PReLU(), nn.MaxPool3d(2), nn.ConvTranspose3d(3, 2, 3, 2), nn.GELU()
    )
    x = torch.rand(2, 1, 9, 8, 7)
    before = reachable_bytes()
    with measure_peak() as meter:
        y = ScaleByTable.apply(net(x))
        assert meter.live_bytes == reachable_bytes() - before
        loss = y.softmax(1).square().mean()
        assert meter.live_bytes == reachable_bytes() - before
        del y
        assert meter.live_bytes == reachable_bytes() - before > 0
        loss.backward()
        assert meter.live_bytes == reachable_bytes() - before
        del loss
        assert meter.live_bytes == sum(p.nbytes for p in net.parameters()) == reachable_bytes() - before


def reachable_bytes() -> int:
    """Bytes of all storages behind tensors that Python knows, their gradients and what their graphs have saved."""
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and not is_lazy(item)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    nodes, seen = [tensor.grad_fn for tensor in tensors], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
        tensors += [value for value in _saved(node) if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage._cdata: storage.nbytes() for storage in storages if storage.resizable()}.values())


def _saved(node: torch.autograd.graph.Node) -> Iterator[object]:
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            try:
                value = getattr(node, name)
            except RuntimeError:  # the backward pass has freed it
                continue
            yield from value if isinstance(value, (tuple, list)) else (value,)


@pytest.mark.slow
def test_agrees_with_the_log_of_the_allocator() -> None:
    """Operations without inner workspace: the profiler's record of every allocation gives the same peak."""
    x = kib(64).view(128, 128).requires_grad_()

    def step() -> None:
        y = (x @ x).relu().softmax(1)
        (y * y.exp()).mean().backward()

    step()
    x.grad = None
    with measure_peak() as meter:
        step()
    x.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as log:
        step()
    assert meter.peak_bytes == max(_levels(log))


def _levels(log: torch.profiler.profile) -> Iterator[int]:
    live, events = 0, list(log.profiler.kineto_results.experimental_event_tree())
    allocations = []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            allocations.append(event)
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        live += event.extra_fields.alloc_size
        yield live

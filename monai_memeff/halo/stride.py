"""How far a network downsamples, found by a dry run on the meta device (no memory, no arithmetic)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_CONVS = {n: (getattr(nn, f"Conv{n}d"), getattr(nn, f"ConvTranspose{n}d")) for n in (1, 2, 3)}
_SIZES = (256, 512, 432, 720, 160, 1024)


def spatial_dims_of(network: nn.Module) -> int:
    """Number of spatial axes of a network, from its convolutions.

    Raises:
        ValueError: if it has none, or convolutions of different dimensions.
    """
    found = {n for m in network.modules() for n, kinds in _CONVS.items() if isinstance(m, kinds)}
    if len(found) != 1:
        raise ValueError(f"Expected convolutions with one number of spatial axes but found {sorted(found) or 'none'}.")
    return found.pop()


@contextmanager
def _recording(network: nn.Module, dims: int) -> Iterator[list[tuple[int, ...]]]:
    """Spatial shapes of all layers' outputs during a forward."""
    shapes: list[tuple[int, ...]] = []

    def note(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == dims + 2:
            shapes.append(tuple(output.shape[2:]))

    handles = [m.register_forward_hook(note) for m in network.modules() if not list(m.children())]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()


def _empty(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(p.detach().to("meta"), requires_grad=False)


@contextmanager
def on_meta(network: nn.Module) -> Iterator[None]:
    """The network without its numbers: parameters and buffers are shapes only, modes are those of inference."""
    kept = [(m, m.training, m._parameters, m._buffers) for m in network.modules()]
    for module, _, parameters, buffers in kept:
        module.training = False
        module._parameters = {
            n: p if p is None else nn.Parameter(p.detach().to("meta"), False) for n, p in parameters.items()
        }
        module._buffers = {n: t if t is None else t.detach().to("meta") for n, t in buffers.items()}
    try:
        with torch.no_grad(), torch.device("meta"):
            yield
    finally:
        for module, mode, parameters, buffers in kept:
            module.training, module._parameters, module._buffers = mode, parameters, buffers


def trace_shapes(network: nn.Module, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Spatial shapes of all layers' outputs for an input shape (B, C, spatial...), without computing anything."""
    dtype = next(iter(network.parameters())).dtype
    with _recording(network, len(shape) - 2) as shapes, on_meta(network):
        network(torch.empty(shape, dtype=dtype, device="meta"))
    return shapes


def network_stride(network: nn.Module, dims: int) -> tuple[int, ...]:
    """Rows of the input per row of the coarsest level, along each spatial axis.

    Raises:
        ValueError: if no trial size passes through the network.
    """
    channels = next(int(m.in_channels) for m in network.modules() if isinstance(m, _CONVS[dims]))
    problem = ""
    for size in _SIZES:
        try:
            shapes = trace_shapes(network, (1, channels, *[size] * dims))
        except (RuntimeError, ValueError) as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        ratios = [[size // n for n in column if n > 1 and size % n == 0] for column in zip(*shapes, strict=False)]
        return tuple(math.lcm(*r, 1) for r in ratios)
    raise ValueError(
        f"Could not find the network's stride by a dry run; pass multiple=. The last trial said: {problem}"
    )

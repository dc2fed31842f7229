"""A dry run: a network's own step on tensors that have shapes and no memory, followed storage by storage."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (  # read in torch 2.6 to 2.14
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.nn.parameter import is_lazy
from torch.utils import _python_dispatch  # read in torch 2.6 to 2.14
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from monai_memeff.errors import InputError
from monai_memeff.memory.dry.known_numbers import KnownNumbers
from monai_memeff.memory.threads import FakeMode, one_at_a_time, unlogged
from monai_memeff.memory.tracker import StorageTracker, Watcher
from monai_memeff.memory.untouched import as_it_was, home

NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What a dry run cannot follow: code that looks at values, shapes that depend on them, kernels without a shape rule."""


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        peak_bytes: highest number of bytes alive at once, of what the step itself makes.
        multiplications: Number in convolutions and matrix products.
        result: what the step returned, tensors without memory.
        kept_bytes: alive at the end of the step, with what it returned.
    """

    peak_bytes: int
    multiplications: int
    result: Any
    kept_bytes: int = 0


class DryMode(FakeMode):
    """Tensors without memory; checks of values pass (:func:`monai_memeff.checks.has_values`).

    A transposed convolution for which torch takes its slow kernel has a result in memory as large as its input.
    """

    is_dry_run = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation without memory."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is not torch.ops.aten.convolution.default or not args[6] or args[8] > 1:
            return result
        with self:
            return _in_memory_of(args[0], result) if _is_slow(args) else result


def _is_slow(args: tuple[Any, ...]) -> bool:
    backend: bool = torch._C._select_conv_backend(*args) == torch._C._ConvBackend.SlowTranspose3d
    return backend


def _in_memory_of(given: Tensor, result: Tensor) -> Tensor:
    memory = torch.empty(max(given.numel(), result.numel()), dtype=result.dtype, device=result.device)
    return memory.as_strided(result.shape, result.stride())


class MultiplicationCounter(TorchDispatchMode):
    """Counts the multiplications of convolutions and matrix products while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._operations = 0

    @property
    def multiplications(self) -> int:
        """So far; torch counts a multiplication and an addition as two operations."""
        return self._operations // 2

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count."""
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        if count is not None:
            self._operations += count(*args, **(kwargs or {}), out_val=result)
        elif func.__name__.startswith("_linear_pointwise"):  # oneDNN's matrix product
            self._operations += 2 * args[0].numel() * args[1].shape[0]
        return result


@one_at_a_time
def dry_run(
    network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, step: Callable[[Tensor], Any], training: bool
) -> DryRun:
    """Run a step of a network without computing or allocating anything.

    Peaks are those of :func:`~monai_memeff.memory.measure_peak` around the same step: the operators, what autograd
    keeps, recomputation and the order in which tensors are freed are the step's own. The network is unchanged
    afterwards: neither gradients nor running statistics nor caches stay, and no random numbers are drawn.

    Args:
        network: whose parameters and buffers get stand-ins without memory, on the same devices.
        shape: Shape of the input, which is made on the network's device and not counted.
        dtype: Type of the input.
        step: gets the input and runs the network; what it makes itself, a label say, takes no memory and counts.
        training: whether gradients are recorded.

    Raises:
        InputError: the network's parameters have no shapes yet.
        Exception: whatever the step raises; :func:`needs_values` tells whether a real step may succeed.
    """
    tracker, mode = StorageTracker("meta", count_older=False), DryMode()
    with (
        _python_dispatch._disable_current_modes(),  # a caller's meter is not to count what is never allocated
        unlogged("torch._subclasses.fake_tensor"),
        _random_state_kept(),
        as_it_was(network, mode),
        torch.set_grad_enabled(training),
        mode,
    ):
        _stand_in(network)
        volume = torch.empty(shape, dtype=dtype, device=home(network))
        with Watcher(tracker), MultiplicationCounter() as counter, KnownNumbers():
            result = step(volume)
        tracker.close()
    return DryRun(tracker.peak, counter.multiplications, result, tracker.live)


def _stand_in(network: nn.Module) -> None:
    """Parameters and buffers without memory, shared ones shared; plain tensors in attributes stay real."""
    known: dict[int, Tensor] = {}

    def one(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if is_lazy(tensor):
            raise InputError("the network's lazy parameters have no shapes yet: call it once on a small input first")
        if id(tensor) not in known:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return known[id(tensor)]

    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise CompiledCodeError
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            table.update({name: one(value) for name, value in table.items()})


class CompiledCodeError(Exception):
    """A module whose parameters belong to compiled code and cannot be stood in for."""


def needs_values(error: Exception) -> bool:
    """Whether a dry run failed because its tensors have no values, and a real one may succeed."""
    return isinstance(error, (*NO_VALUES, CompiledCodeError)) or "tensor subclasses" in str(error)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)

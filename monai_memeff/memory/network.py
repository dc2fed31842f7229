"""estimate_network: what a step of a network will need, before anything is computed, in each of the systems."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from monai_memeff.errors import InputError
from monai_memeff.memory.dry import DryRun, dry_run, needs_values
from monai_memeff.memory.forecast import NetworkEstimate, in_units
from monai_memeff.memory.small import measured_at_small_sizes
from monai_memeff.memory.step import Loss, optimizer_bytes, run_step, tensors_in
from monai_memeff.memory.untouched import bare, home

SYSTEMS = {
    "halo": "monai_memeff.halo.estimate",
    "sparse": "monai_memeff.sparse.estimate",
    "occupancy": "monai_memeff.occupancy.estimate",
    "clstm": "monai_memeff.clstm.estimate",
}
"""System -> module with ``estimate(question) -> NetworkEstimate`` and ``is_own(network) -> bool``, found by name."""


@dataclass(frozen=True)
class Question:
    """What an engine estimates.

    Attributes:
        network: as given, out of its wrappers.
        shape: Shape of the input.
        training: whether a step of training is meant.
        memory_budget: bytes for ``peak_bytes``, None for any number.
        loss: The caller's, None for the engine's usual one.
        image: example (B, C, spatial...) for systems whose cost depends on values, None if not given.
        dense: the estimate of the dense network, None if the network is one of the system's own.
        dtype: Type of the input.
        device: Device of the step.
    """

    network: nn.Module
    shape: tuple[int, ...]
    training: bool
    memory_budget: int | None
    loss: Loss | None
    image: Tensor | None
    dense: NetworkEstimate | None
    dtype: torch.dtype
    device: torch.device

    @property
    def classes(self) -> int:
        """Number of channels of what the dense network returns."""
        if self.dense is None or self.dense.output_shape is None or len(self.dense.output_shape) < 3:
            raise InputError(
                f"{type(self.network).__name__} returns no tensor (B, K, spatial...), so the number of classes is not "
                "known: give the network of the system itself"
            )
        return self.dense.output_shape[1]


def estimate_network(
    network: nn.Module,
    input_shape: Sequence[int],
    training: bool = False,
    system: str = "dense",
    memory_budget: int | None = None,
    *,
    loss: Loss | None = None,
    optimizer: Callable[[list[nn.Parameter]], Any] | None = None,
    image: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> NetworkEstimate:
    """Predict peak memory, host and disk bytes, and multiplications of one step, before it is run.

    ``"dense"`` is a dry run of the network's own step on tensors without memory; a network that looks at values is
    measured on small volumes instead, and ``basis`` says so. ``"halo"`` is the plan that its inferer executes.
    ``"clstm"``, ``"occupancy"`` and ``"sparse"`` are for the network that the overlay of that name would put in the
    place of this one, with its channels and classes, or for this one if it is of that system already.

    Args:
        network: any nn.Module, on any device; nothing of it changes. It is taken in the mode it is in: call ``train()``
            or ``eval()`` first, as before the real step. Other threads may call and train it meanwhile, but not change
            its mode, device, hooks or other attributes, which are put back as they were.
        input_shape: Shape of the input (B, C, spatial...).
        training: forward, loss and backward instead of inference without gradients.
        system: "dense", "halo", "clstm", "occupancy" or "sparse".
        memory_budget: bytes that ``peak_bytes`` may take, and ``host_bytes`` with it where the device is the CPU; the
            setting is chosen so, or it is refused.
        loss: what the network returns -> a number; default cross-entropy of (B, K >= 2, ...), else the mean of squares.
        optimizer: parameters -> an optimizer, such as ``torch.optim.Adam``, whose state is then listed too.
        image: a volume (B, C, spatial...) whose active voxels count for "sparse"; without it every voxel is active.
        dtype: Type of the input; default that of the weights.
        device: Device of the step; default the network's. It decides what is on the host, not how kernels
            of a GPU differ.

    Returns:
        The estimate; see :class:`~monai_memeff.memory.NetworkEstimate` for what is counted.

    Raises:
        InputError: an unknown system, a shape that the network does not take, a system that the network is not suited
            for, or a budget that nothing fits; one line that says the way out.

    Examples:
        >>> network = torch.nn.Conv3d(1, 4, 3, padding=1)
        >>> estimate_network(network, (1, 1, 32, 32, 32)).peak_bytes
        524288
    """
    _check(network, input_shape, system, memory_budget)
    network, shape = bare(network), tuple(int(extent) for extent in input_shape)
    dtype = dtype or _dtype_of(network)
    target = home(network) if device is None else torch.device(device)
    question = Question(network, shape, training, memory_budget, loss, image, None, dtype, target)
    found = _within(_dense(question), memory_budget) if system == "dense" else _of_system(question, system)
    return replace(found, optimizer_bytes=optimizer_bytes(network, optimizer)) if training else found


def _of_system(question: Question, system: str) -> NetworkEstimate:
    engine = importlib.import_module(SYSTEMS[system])
    if not engine.is_own(question.network):
        question = replace(question, dense=_dense(question))
    found: NetworkEstimate = engine.estimate(question)
    dense = question.dense
    if dense is None or not dense.multiplications or found.multiplications is None:
        return found
    return replace(found, relative_time=found.multiplications / dense.multiplications)


def _dense(question: Question) -> NetworkEstimate:
    network, shape, training = question.network, question.shape, question.training
    try:
        found = dry_run(network, shape, question.dtype, step_of(question), training)
        basis = "a dry run of every operation"
    except InputError:
        raise
    except Exception as error:  # of the network's own code, of any kind
        if not needs_values(error):
            raise InputError(_reason(network, shape, error)) from error
        found, basis = measured_at_small_sizes(network, shape, training, question.loss, question.dtype)
    return described(question, found, "dense", network, basis=basis, relative_time=1.0)


def step_of(question: Question) -> Callable[[Tensor], Any]:
    """The plain step of a question's network."""
    return lambda volume: run_step(question.network, volume, question.training, question.loss)


def described(question: Question, found: DryRun, system: str, network: nn.Module, **more: Any) -> NetworkEstimate:
    """An estimate of a dry run of a network, with what can be read from the network itself."""
    first = next(tensors_in(found.result), None)
    trained = [p for p in network.parameters() if p.requires_grad]
    return NetworkEstimate(
        system=system,
        network=type(network).__name__,
        shape=question.shape,
        training=question.training,
        peak_bytes=found.peak_bytes,
        parameter_bytes=sum(t.nbytes for t in (*network.parameters(), *network.buffers())),
        input_bytes=math.prod(question.shape) * question.dtype.itemsize,
        gradient_bytes=sum(p.nbytes for p in trained) if question.training else 0,
        output_shape=None if first is None else tuple(first.shape),
        multiplications=found.multiplications,
        **more,
    )


def _within(found: NetworkEstimate, budget: int | None) -> NetworkEstimate:
    if budget is not None and found.peak_bytes > budget:
        way = "take a smaller volume" if found.training else "take system='halo', which runs it in parts"
        raise InputError(
            f"{found.network} on {found.shape} needs {found.peak_bytes} bytes ({in_units(found.peak_bytes)}) and "
            f"memory_budget is {budget}: raise it, or {way}"
        )
    return found


def _check(network: Any, shape: Any, system: str, budget: Any) -> None:
    if not isinstance(network, nn.Module):
        raise InputError(f"estimate_network takes an nn.Module, got {type(network).__name__}: build the network first")
    if system != "dense" and system not in SYSTEMS:
        raise InputError(f"no system is called {system!r}: choose dense, {', '.join(SYSTEMS)}")
    whole = isinstance(shape, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not whole or len(shape) < 3 or min(shape) < 1:
        raise InputError(f"input_shape is (batch, channels, extents...), whole numbers from 1 on, got {shape!r}")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
        raise InputError(f"memory_budget is a whole number of bytes from 1 on, got {budget!r}")


def _dtype_of(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point() or p.is_complex()), torch.float32)


def _reason(network: nn.Module, shape: tuple[int, ...], error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(network).__name__} does not take an input of {shape}: {type(error).__name__}: {text}"

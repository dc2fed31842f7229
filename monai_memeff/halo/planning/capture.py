"""The network captured once at the whole volume's shape: no Python is left, every size is the whole's."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _python_dispatch  # read in torch 2.6 to 2.14

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.gradients.compare import check_gradients
from monai_memeff.halo.planning.gradients.regions import spell_out_regions
from monai_memeff.halo.planning.gradients.watch import Watch, nothing_saved
from monai_memeff.halo.planning.lower import lower, place_of
from monai_memeff.halo.planning.program import Program, flatten_call, unflatten
from monai_memeff.halo.planning.reasons import check_constants, reason
from monai_memeff.halo.planning.state.aside import calls_traced_here, eager, quiet
from monai_memeff.halo.planning.state.averages import without_reading_counts
from monai_memeff.halo.planning.state.compared_types import refuse_compared_types
from monai_memeff.halo.planning.state.compiling import answered_plainly
from monai_memeff.halo.planning.state.constants import Constants
from monai_memeff.halo.planning.state.counters import Counters
from monai_memeff.halo.planning.state.escapes import Escapes
from monai_memeff.halo.planning.state.second_names import drop_second_names
from monai_memeff.memory.threads import FakeMode, one_at_a_time
from monai_memeff.memory.untouched import as_it_was, bare, home

_TORCH = torch.__version__
_TRIES = 3  # where another thread may be the one that draws


def _fake(leaf: Any, mode: FakeMode, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    with mode:
        if leaf.dim() == 0 and leaf.device.type != "meta":
            device = leaf.device
        made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    return made.requires_grad_(leaf.requires_grad)


class _DrawnError(Exception):
    """Numbers were drawn in Python while a network was captured."""


@contextlib.contextmanager
def _no_hidden_draws() -> Iterator[None]:
    """Refuse a network that draws numbers in Python: the graph would keep one draw for ever.

    torch's own generators are put back as they were.
    """
    python, numpy_state = random.getstate(), np.random.get_state()[1].tobytes()
    numpy_position = np.random.get_state()[2]
    with torch.random.fork_rng(devices=[]):
        yield
    after = np.random.get_state()
    if random.getstate() != python or after[1].tobytes() != numpy_state or after[2] != numpy_position:
        raise _DrawnError


def require_capturable(network: nn.Module) -> None:
    """Refuse what cannot be captured at any shape: NotPartitionableError names the module.

    A class says of itself by ``why_not_in_parts`` that it is not run in parts, and what to use instead.
    """
    for path, module in network.named_modules():
        why = getattr(type(module), "why_not_in_parts", None)
        if why is not None:
            raise NotPartitionableError(f"{path or 'the network'} ({type(module).__name__}) is not run in parts: {why}")
        if isinstance(module, torch.jit.ScriptModule):
            raise NotPartitionableError(
                f"{path or 'the network'} ({type(module).__name__}): a torch.jit module cannot be captured; "
                "pass the module it was scripted from"
            )
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise NotPartitionableError(
                f"{path or 'the network'} ({type(module).__name__}) does not know its size yet: run the network once "
                "on a small volume first"
            )


def _require_gradient_mode_followed() -> None:
    if torch.is_grad_enabled() and _TORCH < (2, 9):
        raise NotPartitionableError(
            f"training in parts needs torch 2.9 or newer, whose torch.export keeps where a network turns gradients off "
            f"and on, and torch is {_TORCH}: update it, or call the network under torch.no_grad() for its results alone"
        )


@one_at_a_time
def capture(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Program:
    """Capture a network at the shapes of its arguments.

    Nothing is allocated and nothing of the network changes. Gradient mode, autocast and training flags are the
    caller's; hooks, parametrizations and caches act as in a plain call. With gradients enabled, those of what is
    captured are the plain network's too.

    Args:
        network: any nn.Module.
        args: example arguments; tensors of any device, meta included, of the whole shape.
        kwargs: example keyword arguments.

    Raises:
        NotPartitionableError: what cannot be captured, with the reason of `torch.export` in one sentence; what has
            other gradients than the plain network.
    """
    network = bare(network)
    _require_gradient_mode_followed()
    require_capturable(network)
    refuse_compared_types(network)
    for _ in range(_TRIES):
        before = random.getstate()
        try:
            return _captured(network, args, kwargs or {})
        except _DrawnError:
            if threading.active_count() == 1:
                random.setstate(before)
                break
    others = "" if threading.active_count() == 1 else " (or another thread draws with them all the while)"
    raise NotPartitionableError(
        "the network draws random numbers with Python's random or numpy.random in forward: these cannot be "
        f"repeated part by part; draw with torch, or call eval(){others}"
    )


def _captured(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    flat, spec = flatten_call(tuple(args), dict(kwargs))
    mode = FakeMode()
    device = home(network)
    with _python_dispatch._disable_current_modes():  # a caller's meter is not to count what is never allocated
        fake_args, fake_kwargs = unflatten([_fake(leaf, mode, device) for leaf in flat], spec)
    escapes, constants = Escapes(), Constants(network)
    try:
        with (
            as_it_was(network),
            _python_dispatch._disable_current_modes(),
            torch.set_grad_enabled(torch.is_grad_enabled()),  # whatever forward leaves
            nothing_saved(),
            answered_plainly(),
            _no_hidden_draws(),
            calls_traced_here(),
            eager(network),
            quiet(),
        ):
            without_reading_counts(network)
            watch = Watch(network) if torch.is_grad_enabled() else contextlib.nullcontext()
            with escapes, constants, Counters(network) as counters, watch:
                exported = torch.export.export(network, fake_args, fake_kwargs, strict=False)
                counters.check(exported, fake_args, fake_kwargs)
            check_constants(exported, place_of)
            if isinstance(watch, Watch):
                spell_out_regions(exported)
                check_gradients(exported, watch, network, flat, place_of)
            drop_second_names(exported)
            with torch.no_grad():
                exported = exported.run_decompositions({})
    except (NotPartitionableError, _DrawnError):
        raise
    except Exception as error:
        sized = constants.sized_by_data if type(error).__name__ == "PendingUnbackedSymbolNotFound" else None
        raise NotPartitionableError(sized or reason(error, network)) from error
    program = lower(exported, network, flat)
    program.call_spec = copy.copy(spec)
    del exported, fake_args, fake_kwargs
    escapes.recall()
    return program

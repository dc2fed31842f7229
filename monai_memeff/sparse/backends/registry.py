"""The visible table of convolution engines: which exist, which can be used where, and which one is in use."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from monai_memeff.checks import as_device
from monai_memeff.sparse.backends.self_test import self_test_error

BACKENDS: dict[str, str] = {
    "native": "monai_memeff.sparse.backends.native",
    "triton": "monai_memeff.sparse.backends.triton",
    "spconv_triton": "monai_memeff.sparse.backends.spconv_triton",
    "spconv": "monai_memeff.sparse.backends.spconv",
    "ocnn": "monai_memeff.sparse.backends.ocnn",
    "minkowski": "monai_memeff.sparse.backends.minkowski",
}
"""Name -> module, imported only when used. A module has two functions:

``unavailable(device: torch.device) -> str | None``, why it cannot be used on a device, and
``convolve(features, weight, bias, geometry) -> Tensor``, see :func:`monai_memeff.sparse.backends.native.convolve`.
"""

AUTO = "auto"

PREFERRED: dict[str, tuple[str, ...]] = {"cuda": ("triton", "spconv_triton", "spconv")}
"""Device type -> engines that "auto" tries in this order before native.

``triton`` comes first: it takes every kernel and every half precision, reads our own tables and needs nothing beside
torch; spconv_triton has the same method for fewer kernels and dtypes, and spconv is no longer maintained. On a CPU
native is the fastest engine that is right with any number of threads.
"""

ENVIRONMENT_VARIABLE = "MEMEFF_SPARSE_BACKEND"

_chosen: str | None = None
_engines: dict[tuple[str, str], ModuleType] = {}
"""(choice, device type) -> the engine it led to."""
_verdicts: dict[tuple[str, str], str | None] = {}
"""(module, device type) -> None if it has passed its test, else the reason why it is not used."""


def register(name: str, module: str) -> None:
    """Add an engine to the table.

    Args:
        name: how users call it.
        module: dotted name of a module with the two functions of :data:`BACKENDS`; imported only when used.

    Raises:
        ValueError: the name is taken.

    Examples:
        >>> register("mine", "my_package.my_engine")
        >>> register("mine", "my_package.another_engine")
        Traceback (most recent call last):
        ValueError: sparse backend 'mine' is registered already (my_package.my_engine); choose another name.
    """
    if name in BACKENDS or name == AUTO:
        owner = BACKENDS.get(name, "the automatic choice")
        raise ValueError(f"sparse backend {name!r} is registered already ({owner}); choose another name.")
    BACKENDS[name] = module


def status(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every registered engine with None if it is usable, else the reason why it is not.

    An engine is usable if its library is there and a forward and backward self-test agrees with native on the device;
    the verdict holds for the process.

    Args:
        device: where the tensors are; default CUDA if there is such a device, else the CPU.

    Examples:
        >>> [name for name, reason in status("cpu").items() if reason is None][0]
        'native'
    """
    where = _devices()[0] if device is None else as_device(device)
    return {name: _reason(name, where) for name in BACKENDS}


def use(name: str | None) -> None:
    """Choose the engine for this process.

    Args:
        name: an engine, "auto", or None to go back to the environment variable MEMEFF_SPARSE_BACKEND, else "auto".

    Raises:
        ValueError: the name is unknown or the engine can be used on no device here; the message says why.

    Examples:
        >>> use("native")
        >>> chosen("cpu")
        'native'
        >>> use(None)
    """
    global _chosen
    if name is not None and name != AUTO:
        _check(name, _devices())
    _chosen = name


def chosen(device: torch.device | str) -> str:
    """Name of the engine that convolutions on a device use.

    That is the one chosen by :func:`use`, else by MEMEFF_SPARSE_BACKEND, else the first usable one of
    :data:`PREFERRED`.

    Args:
        device: where the tensors are.

    Raises:
        ValueError: the engine that was chosen by name cannot be used on this device.

    Examples:
        >>> chosen("cpu")
        'native'
    """
    where = as_device(device)
    choice = _choice()
    if choice != AUTO:
        _check(choice, [where])
        return choice
    usable = (name for name in PREFERRED.get(where.type, ()) if _reason(name, where) is None)
    return next(usable, "native")


def current(device: torch.device) -> ModuleType:
    """The module of the engine in use on a device: see :func:`chosen`, which names the errors.

    It is looked up at every convolution, so remembered.

    Examples:
        >>> current(torch.device("cpu")).__name__
        'monai_memeff.sparse.backends.native'
    """
    key = (_choice(), device.type)
    engine = _engines.get(key)
    if engine is None:
        engine = _engines[key] = importlib.import_module(BACKENDS[chosen(device)])
    return engine


def _choice() -> str:
    return _chosen or os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


def _devices() -> list[torch.device]:
    """The devices of this machine that engines are for, fastest first."""
    names = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    return [torch.device(name) for name in names]


def _check(name: str, devices: list[torch.device]) -> None:
    """Refuse a name that is unknown or whose engine is usable on none of the devices."""
    if name not in BACKENDS:
        raise ValueError(f"sparse backend must be one of {', '.join((*BACKENDS, AUTO))}, got {name!r}.")
    reasons = [_reason(name, device) for device in devices]
    if None not in reasons:
        where = "here" if len(devices) > 1 or devices == _devices() else f"on {devices[0].type} tensors"
        why = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        raise ValueError(f"sparse backend {name!r} cannot be used {where}: {why}. Use 'native', which always can.")


def _reason(name: str, device: torch.device) -> str | None:
    """The remembered verdict on an engine."""
    key = (BACKENDS[name], device.type)
    if key not in _verdicts:
        _verdicts[key] = _judge(BACKENDS[name], device)
    return _verdicts[key]


def _judge(module: str, device: torch.device) -> str | None:
    try:
        engine = importlib.import_module(module)
        reason = engine.unavailable(device)
    except Exception as error:  # a library built for another torch fails in its own ways
        return f"{type(error).__name__}: {error}"
    return reason or self_test_error(engine, device)

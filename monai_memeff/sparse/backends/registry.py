"""The visible table of convolution engines: which exist, which can be used here, and which one is in use."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

BACKENDS: dict[str, str] = {
    "native": "monai_memeff.sparse.backends.native",
}
"""Name -> module. A module has ``unavailable() -> str | None`` and ``convolve(features, weight, bias, kernel_map)``."""

ENVIRONMENT_VARIABLE = "MEMEFF_SPARSE_BACKEND"

_chosen: str | None = None


def register(name: str, module: str) -> None:
    """Add an engine to the table.

    Args:
        name: how users call it.
        module: dotted name of a module with the two functions of :data:`BACKENDS`; imported only when asked for.

    Raises:
        ValueError: the name is taken.
    """
    if name in BACKENDS:
        raise ValueError(f"sparse backend {name!r} is registered already ({BACKENDS[name]}); choose another name.")
    BACKENDS[name] = module


def status() -> dict[str, str | None]:
    """Every registered engine with None if it is usable here, else the reason why it is not."""
    return {name: _reason(name) for name in BACKENDS}


def use(name: str | None) -> None:
    """Choose the engine by name for this process; None goes back to the environment variable or native.

    Raises:
        ValueError: the name is unknown or the engine cannot be used here; the message says why.
    """
    global _chosen
    if name is not None:
        _check(name)
    _chosen = name


def current() -> ModuleType:
    """The engine in use: the one chosen by :func:`use`, else by MEMEFF_SPARSE_BACKEND, else native."""
    name = _chosen or os.environ.get(ENVIRONMENT_VARIABLE) or "native"
    _check(name)
    return importlib.import_module(BACKENDS[name])


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"sparse backend must be one of {', '.join(BACKENDS)}, got {name!r}.")
    reason = _reason(name)
    if reason is not None:
        raise ValueError(f"sparse backend {name!r} cannot be used here: {reason}. Use 'native', which always can.")


def _reason(name: str) -> str | None:
    try:
        return importlib.import_module(BACKENDS[name]).unavailable()
    except ImportError as error:
        return f"{type(error).__name__}: {error}"

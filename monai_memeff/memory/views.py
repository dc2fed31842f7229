"""Parameters and buffers that one thread puts in the place of a network's, and that no other thread sees."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils import _python_dispatch  # read in torch 2.6 to 2.14
from torch.utils._python_dispatch import TorchDispatchMode

from monai_memeff.memory.threads import short_lock

TABLES = ("_parameters", "_buffers")
_changing = short_lock()


class View:
    """Who sees what is put in place.

    Args:
        mode: also the threads it is entered in: autograd enters it in its own ones for GPUs.
    """

    def __init__(self, mode: TorchDispatchMode | None = None) -> None:
        self._thread, self._process, self._mode = threading.get_ident(), os.getpid(), mode

    def is_mine(self) -> bool:
        """Whether the calling thread is one that sees it."""
        if threading.get_ident() == self._thread:
            return os.getpid() == self._process  # a process that was forked gives the number to another thread
        modes = () if self._mode is None else _python_dispatch._get_current_dispatch_mode_stack()
        return any(mode is self._mode for mode in modes)


class _Table(dict[str, Any]):
    """In the place of a module's dict of tensors: every thread reads and writes the one it sees.

    As a plain dict, as code in C takes it, it holds what the module had when it was made.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        super().__init__(shared)
        self.shared, self.views = shared, dict[View, dict[str, Any]]()

    def seen(self) -> dict[str, Any]:
        """The dict of the calling thread."""
        for view, own in reversed(list(self.views.items())):
            if view.is_mine():
                return own
        return self.shared

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self.seen()),)


def _of_the_seen(name: str) -> Callable[..., Any]:
    def method(table: _Table, *args: Any, **kwargs: Any) -> Any:
        return getattr(table.seen(), name)(*args, **kwargs)

    return method


for _name in (
    *("__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__reversed__", "__len__", "__repr__"),
    *("__eq__", "__ne__", "__or__", "__ror__", "__ior__", "keys", "values", "items", "get", "pop", "popitem"),
    *("setdefault", "update", "clear", "copy"),
):
    setattr(_Table, _name, _of_the_seen(_name))


@contextmanager
def own_tensors(modules: Iterable[nn.Module], mode: TorchDispatchMode | None = None) -> Iterator[None]:
    """What this thread writes into the modules' parameters and buffers while the block runs is seen by it alone.

    What other threads write stays. Blocks of several threads may overlap, and end in any order.

    Args:
        modules: whose tables are meant; their submodules are not.
        mode: see :class:`View`.
    """
    view, modules = View(mode), list(modules)
    try:
        for module in modules:
            open_view(module, view)
        yield
    finally:
        for module in modules:
            close_view(module, view)


def open_view(module: nn.Module, view: View) -> None:
    """Let the threads of a view write to the module's tables what no others see, until it is closed."""
    with _changing:
        for name in TABLES:
            now = module.__dict__.get(name)
            if isinstance(now, dict):  # compiled code has another kind
                table = now if isinstance(now, _Table) else _Table(now)
                table.views[view] = dict(table.seen())
                module.__dict__[name] = table


def close_view(module: nn.Module, view: View) -> None:
    """Let the threads of a view see what all others see."""
    with _changing:
        for name in TABLES:
            table = module.__dict__.get(name)
            if isinstance(table, _Table):
                table.views.pop(view, None)
                if not table.views:
                    module.__dict__[name] = table.shared

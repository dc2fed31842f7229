"""A network in evaluation mode in several threads at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

_changing = threading.RLock()
if hasattr(os, "register_at_fork"):  # a worker of a data loader finds it open
    os.register_at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_changing.release)
_inside: WeakKeyDictionary[nn.Module, list[dict[nn.Module, bool]]] = WeakKeyDictionary()


@contextmanager
def evaluated(network: nn.Module) -> Iterator[None]:
    """The network is in evaluation mode and no gradients are recorded while the block runs.

    The first of several threads changes the modes of its modules, and the last one puts them back.
    """
    with _changing:
        blocks = _inside.setdefault(network, [])
        if not blocks:
            blocks.append({module: module.training for module in network.modules()})
            network.eval()
        blocks.append({})
    try:
        with torch.no_grad():
            yield
    finally:
        with _changing:
            blocks.pop()
            if len(blocks) == 1:
                for module, training in blocks.pop().items():
                    module.training = training

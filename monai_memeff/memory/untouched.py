"""A network that is looked at and left as it was: out of its wrappers, and with every attribute put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode  # read in torch 2.6 to 2.14

from monai_memeff.memory.views import own_tensors


def bare(network: nn.Module) -> nn.Module:
    """The network itself, out of the wrappers of DistributedDataParallel, DataParallel and torch.compile.

    A wrapper that does more than pass on, by a forward or hooks of its own, is kept.
    """
    inner = _wrapped(network)
    while inner is not None and not (network._forward_hooks or network._forward_pre_hooks):
        network, inner = inner, _wrapped(inner)
    return network


def _wrapped(network: nn.Module) -> nn.Module | None:
    kind: type[nn.Module]
    for kind in (nn.parallel.DistributedDataParallel, nn.DataParallel):
        if isinstance(network, kind) and type(network).forward is kind.forward:
            return network._modules["module"]
    kind = type(network)
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo"):  # read in torch 2.6 to 2.14
        return network._modules["_orig_mod"]
    return None


def home(network: nn.Module) -> torch.device:
    """The device of the network's first parameter or buffer; the CPU if it has none."""
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def as_it_was(network: nn.Module, mode: TorchDispatchMode | None = None) -> Iterator[None]:
    """Afterwards all attributes of all modules are those from before: forward may cache what is not real.

    Parameters and buffers that are put in place meanwhile are seen by this thread alone; other attributes by all.

    Args:
        network: about to be looked at.
        mode: also the threads it is entered in see the same parameters and buffers.
    """
    modules = list(network.modules())
    with own_tensors(modules, mode):
        saved = [_Attributes(module) for module in modules]
        try:
            yield
        finally:
            for attributes in saved:
                attributes.restore()


class _Attributes:
    """A module's attributes as they are, lists and dicts among them by content."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.attributes = module, dict(module.__dict__)
        self.contents = {k: copy.copy(v) for k, v in self.attributes.items() if type(v) in (list, dict, set)}

    def restore(self) -> None:
        """Put everything back that has changed; what has not is left alone, as other threads may be reading it."""
        for key, content in self.contents.items():
            _refill(self.attributes[key], content)
        now = self.module.__dict__
        for key in [key for key in now if key not in self.attributes]:
            del now[key]
        for key, value in self.attributes.items():
            if key not in now or now[key] is not value:
                now[key] = value


def _refill(kept: Any, content: Any) -> None:
    """Give a list, dict or set the content it had."""
    if isinstance(kept, list):
        if len(kept) != len(content) or any(a is not b for a, b in zip(kept, content, strict=True)):
            kept[:] = content
        return
    for extra in [item for item in kept if item not in content]:
        kept.discard(extra) if isinstance(kept, set) else kept.pop(extra)
    if isinstance(kept, dict) and list(kept) != [key for key in content if key in kept]:
        kept.clear()  # or the order would be another one
    if isinstance(kept, set) or len(kept) != len(content) or any(kept[key] is not content[key] for key in content):
        kept.update(content)

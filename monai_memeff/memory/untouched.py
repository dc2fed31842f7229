"""A network that is looked at and left as it was: out of its wrappers, and with every attribute put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from monai_memeff.memory.threads import one_at_a_time


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


@one_at_a_time  # in a dry run of another thread the parameters are stand-ins, whose device changes
def home(network: nn.Module) -> torch.device:
    """The device of the network's first parameter or buffer; the CPU if it has none."""
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def as_it_was(network: nn.Module) -> Iterator[None]:
    """Afterwards all attributes of all modules are those from before: forward may cache what is not real."""
    saved = [_Attributes(module) for module in network.modules()]
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
        """Put everything back."""
        for key, content in self.contents.items():
            kept = self.attributes[key]
            kept.clear()
            kept.extend(content) if isinstance(kept, list) else kept.update(content)
        now = self.module.__dict__
        for key in now.keys() - self.attributes.keys():
            del now[key]
        now.update(self.attributes)

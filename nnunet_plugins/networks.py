"""What our networks owe nnU-Net: names under which it starts the layers of the classes anew, for another set of labels.

``nnUNetv2_train -pretrained_weights`` exempts keys that contain ``.seg_layers.`` and needs equal shapes for all others.
So whatever has a shape that depends on the number of classes is called that in state dicts. Modules keep their names,
and state dicts without the word load as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WORD = "seg_layers"


def mark_class_layers(network: nn.Module, with_another_class: Callable[[], nn.Module]) -> None:
    """Put ``.seg_layers.`` into the names of all parameters and buffers whose shape depends on the number of classes.

    Args:
        network: In which this is done.
        with_another_class: Builds the same network for one class more; called on torch's meta device.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        other = with_another_class().state_dict()
    names = {name: marked(name) for name, value in network.state_dict().items() if other[name].shape != value.shape}
    network.register_state_dict_post_hook(Renaming(names))
    network.register_load_state_dict_pre_hook(Renaming({new: name for name, new in names.items()}))


class Renaming:
    """A state dict's hook that gives keys other names, in their places.

    Args:
        names: Name within the module -> its other name.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rename in place."""
        for key in list(state):
            value = state.pop(key)
            name = key[len(prefix) :] if key.startswith(prefix) else ""
            state[prefix + self.names[name] if name in self.names else key] = value


def marked(name: str) -> str:
    """The name in state dicts: ``head.weight`` becomes ``head.seg_layers.weight``."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner or 'logits'}.{WORD}.{leaf}"


def unwrapped(network: Any) -> Any:
    """The network without the wrappers of torch.compile and DDP."""
    for name in ("_orig_mod", "module"):
        network = getattr(network, name, network)
    return network

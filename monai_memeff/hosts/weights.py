"""A network that refuses to answer before it was trained or its own weights were loaded, in every host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from monai_memeff.errors import InputError

Network = TypeVar("Network", bound=nn.Module)


def require_weights(network: Network, purpose: str = "") -> Network:
    """The same network, which from now on refuses foreign checkpoints, and to answer without weights.

    A checkpoint is the network's own if it has all its weights, by name and shape. Another one is refused when it is
    loaded, also with ``strict=False``; so is a dictionary that a host filled up with the network's present weights. In
    evaluation the network and its children refuse to compute before such a checkpoint was loaded or a step of training
    was computed, so it does not matter which of its methods a host calls.

    Args:
        network: any network; it is changed in place and keeps its type, its keys and its layers.
        purpose: what it was built for, to be named in messages.

    Raises:
        InputError: later, from ``load_state_dict`` and from ``forward``.

    Examples:
        >>> network = require_weights(torch.nn.Conv3d(1, 2, 1), "the overlay halo").eval()
        >>> network.load_state_dict(torch.nn.Conv3d(1, 2, 1).state_dict())  # refused if it is another network's
        <All keys matched successfully>
        >>> network(torch.rand(1, 1, 4, 4, 4)).shape  # refused before
        torch.Size([1, 2, 4, 4, 4])
    """
    guard = _Guard(type(network).__name__, purpose)
    network.register_load_state_dict_pre_hook(guard.on_load)
    network.register_forward_pre_hook(guard.on_forward)
    for part in network.children():
        part.register_forward_pre_hook(guard.on_part)
    return network


class _Guard:
    """What is known about a network's weights; an object of its own, so that copies of the network have copies."""

    def __init__(self, name: str, purpose: str) -> None:
        self.name = f"{name} of {purpose}" if purpose else name
        self.known = False

    def on_load(self, network: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Refuse a dictionary that is not this network's; otherwise the weights are known from now on."""
        own = {name: tensor for name, tensor in network.state_dict().items() if "num_batches_tracked" not in name}
        found = {name: state.get(prefix + name) for name in own}
        foreign = [name for name, value in found.items() if value is None or value.shape != own[name].shape]
        if not self.known:
            foreign += [name for name, value in found.items() if name not in foreign and _same(value, own[name])]
        if foreign:
            raise InputError(
                f"the checkpoint is not of the {self.name}: {len(foreign)} of its {len(own)} weights are missing there "
                f"or have another shape, such as {foreign[0]}; train with the overlay first, or give the checkpoint of "
                f"such a training"
            )
        self.known = True

    def on_forward(self, network: nn.Module, _: Any) -> None:
        """A step of training makes the weights this network's own."""
        if network.training and torch.is_grad_enabled():
            self.known = True
        self.on_part()

    def on_part(self, *_: Any) -> None:
        """Refuse to compute with weights of nobody."""
        if not self.known:
            raise InputError(
                f"the {self.name} has random weights: no checkpoint was loaded; train with the overlay first and "
                f"load what it saved (to try it with random weights all the same: --network_def#require_weights false)"
            )


def _same(value: Tensor, own: Tensor) -> bool:
    """Whether a host gives the network's own memory back, as MONAI does where a checkpoint has nothing to offer."""
    return own.numel() > 0 and own.device.type != "meta" and value.data_ptr() == own.data_ptr()

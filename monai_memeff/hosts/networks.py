"""The network of a bundle replaced by one of ours, with what the bundle says about channels and classes."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from monai_memeff.errors import InputError
from monai_memeff.hosts.weights import require_weights
from monai_memeff.sparse.networks.unet import SparseUNet

logger = logging.getLogger(__name__)

NAMES = {
    "in_channels": ("in_channels", "n_channels", "input_channels", "in_chans"),
    "out_channels": ("out_channels", "num_classes", "n_classes", "out_chans"),
}
"""What networks call their numbers of channels: MONAI's and those that bundles bring along."""


def replace_network(
    replacement: str,
    overlay: str,
    instead: Mapping[str, Any] | None = None,
    require_weights: bool = True,
    **network_def: Any,
) -> nn.Module:
    """One of our networks in the place of a bundle's, with the same numbers of channels and classes.

    Written into ``network_def#_target_`` by an overlay, it gets the arguments of the bundle's network. It takes from
    them what the replacement has under the same name and reads the channels under the usual names.

    Args:
        replacement: dotted name of the new network's class.
        overlay: name of the overlay, for messages.
        instead: values that go before the bundle's where they are not None.
        require_weights: see :func:`~monai_memeff.hosts.require_weights`.
        network_def: the arguments of the bundle's network, with the overlay's own.

    Raises:
        InputError: the bundle's network is not for volumes, or does not say its channels.

    Examples:
        >>> unet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8)}
        >>> network = replace_network("monai_memeff.clstm.CLSTMUNet", "clstm", require_weights=False, **unet)
        >>> network(torch.rand(1, 1, 16, 16, 4)).shape
        torch.Size([1, 2, 16, 16, 4])
    """
    given = {name: value for name, value in (instead or {}).items() if value is not None}
    _refuse_flat(network_def, overlay)
    arguments = {name: given.get(name, _channels(name, network_def, overlay, given)) for name in NAMES}
    module, _, kind = replacement.rpartition(".")
    network = getattr(importlib.import_module(module), kind)
    known = set(inspect.signature(network).parameters)
    spelled = {name for names in NAMES.values() for name in names}
    arguments |= {name: value for name, value in network_def.items() if name in known - spelled}
    left = sorted(set(network_def) - known - spelled - {"_desc_", "spatial_dims"})
    if left:
        logger.info(f"overlay {overlay}: {kind} does not use the bundle's {', '.join(left)}")
    return _guarded(network(**arguments), overlay, require_weights)


def switch_unet(overlay: str, require_weights: bool = True, **network_def: Any) -> SparseUNet:
    """MONAI's UNet of a bundle as a SparseUNet, with the same arguments and names of weights.

    Args:
        overlay: name of the overlay, for messages.
        require_weights: see :func:`~monai_memeff.hosts.require_weights`.
        network_def: the arguments of the bundle's network, and those that SparseUNet has beside them.

    Raises:
        InputError: these are not the arguments of a UNet for volumes.

    Examples:
        >>> unet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8), "strides": (2,)}
        >>> type(switch_unet("sparse_unet", require_weights=False, **unet)).__name__
        'SparseUNet'
    """
    parameters = inspect.signature(SparseUNet).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    _refuse_flat(network_def, overlay)
    foreign, missing = sorted(set(network_def) - set(parameters)), sorted(needed - set(network_def))
    if foreign or missing:
        why = f"has {', '.join(foreign)}" if foreign else f"lacks {', '.join(missing)}"
        raise InputError(
            f"the overlay {overlay} switches MONAI's UNet (spatial_dims 3) and no other network, and this bundle's "
            f"network_def {why}: choose the overlay halo_inference, clstm or occupancy, see docs/overlays.md"
        )
    return _guarded(SparseUNet(**network_def), overlay, require_weights)


def _guarded(network: Any, overlay: str, required: bool) -> Any:
    return require_weights(network, f"the overlay {overlay}") if required else network


def _refuse_flat(network_def: Mapping[str, Any], overlay: str) -> None:
    dims = network_def.get("spatial_dims", network_def.get("dimensions", 3))
    if dims != 3:
        raise InputError(f"the overlay {overlay} is for volumes: this bundle's network_def has spatial_dims {dims}")


def _channels(name: str, network_def: Mapping[str, Any], overlay: str, given: Mapping[str, Any]) -> Any:
    found = [network_def[word] for word in NAMES[name] if word in network_def]
    if not found and name not in given:
        raise InputError(
            f"the overlay {overlay} reads {name} from the bundle's network_def, which names none of "
            f'{", ".join(NAMES[name])}: add --network_def#{name} N, or "network_def#{name}": N in a file after it'
        )
    return found[0] if found else None

"""Checks at a bundle's start that what an overlay sets is what the bundle's engine uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from monai_memeff.errors import InputError
from monai_memeff.halo import NotPartitionableError
from monai_memeff.halo.planning.capture import require_capturable


def require_in_use(overlay: str, found: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    """Refuse to start where a bundle's engine does not get what an overlay sets: a later file has replaced it.

    Args:
        overlay: its name, for the message.
        found: argument of the engine -> what the bundle gives there, which a configuration reads as
            ``%evaluator#inferer`` without making the engine, or its class by name (``%evaluator#inferer#_target_``).
        wanted: Argument -> name of the class it must have, after DistributedDataParallel is taken off.

    Raises:
        InputError: another class is in use; the message names it.

    In a configuration::

        {"_target_": "monai_memeff.hosts.require_in_use", "overlay": "clstm_inference",
         "found": {"network": "%evaluator#network"}, "wanted": {"network": "CLSTMUNet"}}

    Examples:
        >>> require_in_use("halo", {"network": torch.nn.Conv3d(1, 1, 1)}, {"network": "Conv3d"})
        >>> require_in_use("clstm", {"network": torch.nn.Conv3d(1, 1, 1)}, {"network": "CLSTMUNet"})
        Traceback (most recent call last):
        monai_memeff.errors.InputError: the overlay clstm has no effect: the bundle's network is Conv3d, not ...
    """
    for part, kind in wanted.items():
        names = _names(found[part])
        if kind not in names:
            raise InputError(
                f"the overlay {overlay} has no effect: the bundle's {part} is {names[0]}, not {kind}; name "
                f"the overlay after the file that sets it, and combine it with no other overlay that replaces it"
            )


def require_partitionable(overlay: str, network: nn.Module) -> None:
    """Refuse a network that an overlay would run in parts and that is not run in parts: one of another overlay, say.

    Args:
        overlay: its name, for the message.
        network: the bundle's.

    Raises:
        InputError: it names the network and what to use instead.

    Examples:
        >>> require_partitionable("halo_inference", torch.nn.Conv3d(1, 2, 3))
        >>> from monai_memeff.clstm import CLSTMUNet
        >>> require_partitionable("halo_inference", CLSTMUNet(channels=(4, 8)))
        Traceback (most recent call last):
        monai_memeff.errors.InputError: the overlay halo_inference runs the bundle's network in parts, and ...
    """
    try:
        require_capturable(_bare(network))
    except NotPartitionableError as error:
        raise InputError(
            f"the overlay {overlay} runs the bundle's network in parts, and {error}; name no other overlay that "
            f"replaces the network"
        ) from None


def require_exclusive_classes(overlay: str, network: nn.Module, postprocessing: Any) -> None:
    """Refuse a bundle whose classes overlap (one sigmoid each): points are trained and followed for one label each.

    Args:
        overlay: its name, for the message.
        network: what has ``out_channels``.
        postprocessing: the bundle's transforms on predictions.

    Raises:
        InputError: there are several classes, and a transform takes the sigmoid of predictions.

    Examples:
        >>> from monai.transforms import Activationsd, Compose
        >>> network, softmax = torch.nn.Conv3d(1, 3, 1), Compose([Activationsd("pred", softmax=True)])
        >>> require_exclusive_classes("occupancy", network, softmax)
    """
    if int(getattr(_bare(network), "out_channels", 2)) > 1 and any(_sigmoids(postprocessing)):
        raise InputError(
            f"the overlay {overlay} is for bundles whose classes exclude each other (softmax), and the classes of this "
            f"bundle overlap (sigmoid): choose the overlay clstm or halo"
        )


def _sigmoids(transform: Any) -> Iterator[bool]:
    for part in getattr(transform, "transforms", [transform]):
        if part is not transform:
            yield from _sigmoids(part)
        elif "Activations" in type(part).__name__:
            given = getattr(part, "sigmoid", False)
            yield any(given) if isinstance(given, tuple) else bool(given)


def _names(thing: Any) -> list[str]:
    """Names of a thing's class and its parents, or the one that a dotted name ends in."""
    return [thing.rpartition(".")[2]] if isinstance(thing, str) else [k.__name__ for k in type(_bare(thing)).__mro__]


def _bare(thing: Any) -> Any:
    """Without DistributedDataParallel and torch.compile around it."""
    while isinstance(thing, nn.Module):
        inner = getattr(thing, "_orig_mod", None) or getattr(thing, "module", None)
        if not isinstance(inner, nn.Module):
            break
        thing = inner
    return thing

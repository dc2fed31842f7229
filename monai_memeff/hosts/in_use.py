"""Checks at a bundle's start that what an overlay sets is what the bundle's engine uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from monai_memeff.errors import InputError


def require_in_use(overlay: str, found: Mapping[str, Any], wanted: Mapping[str, str]) -> None:
    """Refuse to start where a bundle's engine does not get what an overlay sets: a later file has replaced it.

    Args:
        overlay: its name, for the message.
        found: argument of the engine -> what the bundle gives there, which a configuration reads as
            ``%evaluator#inferer`` without making the engine.
        wanted: Argument -> name of the class it must have, after DistributedDataParallel is taken off.

    Raises:
        InputError: another class is in use; the message names it.

    Example::

        {"_target_": "monai_memeff.hosts.require_in_use", "overlay": "clstm_inference",
         "found": {"network": "%evaluator#network"}, "wanted": {"network": "CLSTMUNet"}}
    """
    for part, kind in wanted.items():
        bare = _bare(found[part])
        if kind not in [base.__name__ for base in type(bare).__mro__]:
            raise InputError(
                f"the overlay {overlay} has no effect: the bundle's {part} is {type(bare).__name__}, not {kind}; name "
                f"the overlay after the file that sets it, and combine it with no other overlay that replaces it"
            )


def _bare(thing: Any) -> Any:
    """Without DistributedDataParallel and torch.compile around it."""
    while isinstance(thing, nn.Module):
        inner = getattr(thing, "_orig_mod", None) or getattr(thing, "module", None)
        if not isinstance(inner, nn.Module):
            break
        thing = inner
    return thing

"""Why a network cannot be partitioned: every reason, by module, operator and line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.halo.planning.binding import bind_program
from monai_memeff.halo.planning.capture import capture
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.plan import examples


@numbers_checked
def explain(network: nn.Module, inputs: Any, axis: int = 0, kwargs: dict[str, Any] | None = None) -> list[str]:
    """The reasons why a network cannot be partitioned exactly; empty if it can.

    Args:
        network: any nn.Module; it is not changed, and nothing is computed.
        inputs: shape of the input (B, C, spatial...), or a tuple of example arguments on any device, meta included.
        axis: spatial axis that is to be cut.
        kwargs: example keyword arguments.

    Returns:
        One line for each reason: module path, operator, the user's line.

    Examples:
        >>> explain(torch.nn.Conv3d(1, 1, 3), (1, 1, 16, 16, 16))
        []
    """
    try:
        with torch.no_grad():
            program = capture(network, examples(inputs, network), kwargs)
        bind_program(program, (axis,))
    except NotPartitionableError as refusal:
        return refusal.reasons
    return []

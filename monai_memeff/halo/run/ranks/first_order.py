"""Backward passes through which gradients of gradients cannot go."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NotPartitionableError


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of a `torch.autograd.Function`, refused where it is to have a graph of its own.

    `once_differentiable` raises later, and only where the incoming gradient has a graph: what the second derivative
    owes to saved tensors would be missing without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotPartitionableError(
                "backward of a network in parts was called with create_graph=True, but gradients of gradients are not "
                "computed in parts; leave create_graph out, or compute the term that needs them (a gradient penalty, "
                "say) with a copy of the network that is not partitioned"
            )
        return backward(ctx, *gradients)

    return checked

"""The step that is estimated: inference, or forward, loss and backward; and the loss where none is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.errors import InputError

Loss = Callable[[Any], Tensor]
"""What the network returns -> a number."""


def stand_in_loss(output: Any) -> Tensor:
    """A loss of the usual cost for any output: cross-entropy against a label map, which it makes itself.

    Args:
        output: tensors, also in lists, tuples, dictionaries. Those of (B, K, ...) with K >= 2 get cross-entropy, all
            other floating-point or complex ones the mean of squares; the losses are added.

    Raises:
        InputError: no tensor of the output has a gradient.
    """
    losses = [_loss(tensor) for tensor in tensors_in(output) if tensor.requires_grad]
    if not losses:
        raise InputError(
            "nothing that the network returns has a gradient: it cannot be trained, or its weights are frozen"
        )
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _loss(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.abs().square().mean()
    if tensor.dim() >= 3 and tensor.shape[1] > 1:
        label = torch.zeros(tensor.shape[0], *tensor.shape[2:], dtype=torch.long, device=tensor.device)
        return F.cross_entropy(tensor, label)
    return tensor.square().mean()


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors of a network's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in tensors_in(value))
    elif isinstance(output, (list, tuple)):
        yield from (tensor for value in output for tensor in tensors_in(value))


def run_step(network: nn.Module, volume: Tensor, training: bool, loss: Loss | None = None) -> Any:
    """One step; what the network returned.

    Args:
        network: run as it is; gradients are added to its parameters in training.
        volume: The input.
        training: also loss and backward pass.
        loss: default :func:`stand_in_loss`.
    """
    if not training:
        with torch.no_grad():
            return network(volume)
    output = network(volume)
    (loss or stand_in_loss)(output).backward()
    return output


def optimizer_bytes(network: nn.Module, optimizer: Callable[[list[nn.Parameter]], Any] | None) -> int:
    """Bytes of an optimizer's state for all parameters that are trained: of a step with one small parameter."""
    if optimizer is None:
        return 0
    trial = nn.Parameter(torch.zeros(7, 5))
    made = optimizer([trial])
    trial.grad = torch.zeros_like(trial)
    made.step()
    copies = sum(value.shape == trial.shape for value in made.state[trial].values() if isinstance(value, Tensor))
    return int(copies) * sum(p.nbytes for p in network.parameters() if p.requires_grad)

"""What is known of a network before it is estimated, whatever host it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from monai_memeff.errors import InputError


@dataclass(frozen=True)
class Source:
    """A network and what its host says about it.

    Attributes:
        name: for the report.
        network: the dense network, in evaluation mode.
        kind: "bundle", "plans" or "dotted".
        loss: output of the network -> a number, as the host trains; None for the usual one.
        loss_name: in words.
        optimizer: parameters -> optimizer; None if the host names none.
        twins: system -> makes the network that the overlay of that name puts in the place, or raises InputError.
        shape: Shape of the input that the host says, None if it says none.
        exclusive: whether classes exclude each other; None if the host does not say.
    """

    name: str
    network: nn.Module
    kind: str
    loss: Callable[[Any], Tensor] | None = None
    loss_name: str = "cross-entropy, or the mean of squares"
    optimizer: Callable[[Any], Any] | None = None
    twins: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None


def made(what: str, make: Callable[[], Any]) -> Any:
    """What somebody else's code makes, its errors in one line.

    Raises:
        InputError: it fails; the first cause is named.
    """
    try:
        return make()
    except InputError:
        raise
    except Exception as error:  # of the host's own code, of any kind
        raise InputError(f"{what} cannot be made: {first_cause(error)}") from error


def network_of(what: str, make: Callable[[], Any]) -> nn.Module:
    """A network that somebody else's code makes.

    Raises:
        InputError: it fails, or gives something else.
    """
    network = made(what, make)
    if not isinstance(network, nn.Module):
        raise InputError(f"{what} gives {type(network).__name__}, and a network is a torch.nn.Module")
    return network.eval()


def first_cause(error: BaseException) -> str:
    """What began a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"

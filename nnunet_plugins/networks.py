"""What a network is inside the wrappers that nnU-Net puts around it."""

from __future__ import annotations

from typing import Any


def unwrapped(network: Any) -> Any:
    """The network without the wrappers of torch.compile and DDP."""
    for name in ("_orig_mod", "module"):
        network = getattr(network, name, network)
    return network

"""`memeff doctor`: what is installed, and which sparse engines can be used here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from monai_memeff.sparse import backends

PACKAGES = ("monai-memeff", "monai", "torch", "numpy", "nnunetv2")


def findings() -> Iterator[str]:
    """Versions, then every sparse engine on every kind of device with the reason why it cannot be used, if any."""
    for package in PACKAGES:
        try:
            yield f"{package:14} {version(package)}"
        except PackageNotFoundError:
            yield f"{package:14} not installed"
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield f"on {device} tensors:"
        for name, reason in backends.status(device).items():
            yield f"sparse engine {name}: {'usable' if reason is None else reason}"
        try:
            yield f"in use: {backends.chosen(device)}"
        except ValueError as error:
            yield f"in use: none. {error}"

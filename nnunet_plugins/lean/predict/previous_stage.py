"""The input of a cascade's second stage: the image, and the labels of the first, one-hot in a tile at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor


class WithPreviousStage:
    """An image whose further channels, one per label, are made where they are looked at.

    Args:
        image: (C, X, Y, Z).
        labels: (X, Y, Z).
        known: The labels that have a channel, in order.
    """

    ndim = 4

    def __init__(self, image: Tensor, labels: Tensor, known: Sequence[int]) -> None:
        self.image, self.labels, self.known = image, labels, [int(label) for label in known]

    @property
    def shape(self) -> torch.Size:
        """(C + number of labels, X, Y, Z)."""
        return torch.Size((self.image.shape[0] + len(self.known), *self.image.shape[1:]))

    def __getitem__(self, at: Any) -> Tensor:
        """The channels of a tile; ``at`` starts with ``slice(None)``."""
        labels = self.labels[at[1:]]
        values = torch.tensor(self.known).view(-1, *[1] * labels.ndim)  # labels may be bytes, which hold few values
        return torch.cat([self.image[at], (labels[None] == values).to(self.image.dtype)])

    def whole(self) -> Tensor:
        """All channels in memory."""
        return self[(slice(None),) * 4]

    def padded(self, patch: Sequence[int]) -> tuple[WithPreviousStage, tuple[slice, ...]]:
        """As nnU-Net pads, and where the image lies in the result."""
        image, inside = pad_nd_image(self.image, patch, "constant", {"value": 0}, True, None)
        labels = pad_nd_image(self.labels[None], patch, "constant", {"value": 0}, False, None)[0]
        return WithPreviousStage(image, labels, self.known), inside

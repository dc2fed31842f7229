"""The recurrence over slices: a convolutional LSTM cell whose input gates are computed beforehand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked

State = tuple[Tensor, Tensor]
"""(h, c): hidden and cell state of one slice, each (B, hidden_channels, H, W)."""


class GatedConvLSTMCell(nn.Module):
    """Convolutional LSTM cell that gets the input's part of its four gates ready-made (here: from a U-Net).

    Van de Leemput et al. 2018, figure 1: with u the gate maps of slice z, in the order i, f, o, g::

        i, f, o = sigmoid(u + conv(h_before) + b)      g = tanh(u + conv(h_before) + b)
        c = f * c_before + i * g                       h = o * tanh(c)

    The paper does not say the size of the hidden-to-hidden kernels (3x3 assumed) nor how they start. Here kernels and
    biases start at zero: volumes then begin with what the gates learned from single slices. Single slices cannot teach
    the kernels, and random ones would disturb.

    Args:
        hidden_channels: Number of channels of both states.
        kernel_size: odd.

    Raises:
        ValueError: an even kernel or no channel.

    Examples:
        >>> cell, state = GatedConvLSTMCell(hidden_channels=2), torch.zeros(1, 2, 16, 16)
        >>> hidden, h, c = cell(torch.rand(1, 5, 8, 16, 16), state, state)
        >>> hidden.shape, h.shape
        (torch.Size([1, 5, 2, 16, 16]), torch.Size([1, 2, 16, 16]))
    """

    @numbers_checked
    def __init__(self, hidden_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if hidden_channels < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"hidden_channels must be at least 1 and kernel_size odd, got {hidden_channels} and {kernel_size}."
            )
        self.hidden_channels = hidden_channels
        self.conv = nn.Conv2d(hidden_channels, 4 * hidden_channels, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, gates: Tensor, h: Tensor, c: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Walk over slices.

        Args:
            gates: (B, n, 4 * hidden_channels, H, W), slice by slice.
            h: hidden state (B, hidden_channels, H, W) before the first slice.
            c: cell state likewise.
            reverse: start at the last slice.

        Returns:
            The hidden states (B, n, hidden_channels, H, W) in the order of the slices, and h and c after the walk.
        """
        order = range(gates.shape[1])
        hidden: list[Tensor] = []
        for z in reversed(order) if reverse else order:
            inputs, forget, output, new = (gates[:, z].to(c.dtype) + self.conv(h)).chunk(4, dim=1)
            c = forget.sigmoid() * c + inputs.sigmoid() * new.tanh()
            h = output.sigmoid() * c.tanh()
            hidden.append(h)
        if reverse:
            hidden.reverse()
        return torch.stack(hidden, dim=1), h, c

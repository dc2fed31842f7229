"""The Pade activation unit: a learned rational function that starts as a leaky ReLU."""

from __future__ import annotations

import torch
from monai.networks.layers import get_act_layer
from torch import Tensor, nn

from monai_memeff.memory import checkpoint

# least squares fit of LeakyReLU(0.01) on [-5, 5]; the largest error there is 0.05, at 0
NUMERATOR = (0.049673, 0.618383, 1.39338, 1.097704, 0.320407, 0.032472)
DENOMINATOR = (0.684906, 1.580084, 0.187985, 0.044912)


class PadeActivation(nn.Module):
    """P(x) / Q(x) with P of degree 5 and Q(x) = 1 + |b1 x| + ... + |b4 x^4|, one for all channels: 10 parameters.

    Molina, Schramowski and Kersting, "Pade activation units", ICLR 2020 (arXiv 1907.06732), the safe form: Q is never
    below 1. It is computed in float32 at least (x^5 leaves half precision early), and its intermediate results are
    recomputed in the backward pass instead of kept.

    Shape: any -> the same; the input's dtype.

    Examples:
        >>> act = PadeActivation()
        >>> bool((act(torch.tensor([-3.0, 3.0])) - torch.tensor([-0.03, 3.0])).abs().max() < 0.05)
        True
        >>> sum(parameter.numel() for parameter in act.parameters())
        10
    """

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor(NUMERATOR))
        self.denominator = nn.Parameter(torch.tensor(DENOMINATOR))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to every value."""
        return checkpoint(self._evaluate, x, preserve_rng=False)

    def _evaluate(self, x: Tensor) -> Tensor:
        a, b = self.numerator, self.denominator.abs()
        wide = x.to(torch.promote_types(x.dtype, a.dtype))
        size = wide.abs()
        p = a[4] + a[5] * wide
        for power in (3, 2, 1, 0):
            p = p * wide + a[power]
        q = b[2] + b[3] * size
        for power in (1, 0):
            q = q * size + b[power]
        return (p / (q * size + 1)).to(x.dtype)


def activation(act: tuple | str) -> nn.Module:
    """``"PADE"``, or an activation by MONAI's name, with arguments if wanted."""
    return PadeActivation() if act == "PADE" else get_act_layer(act)

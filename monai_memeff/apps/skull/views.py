"""Test-time augmentation: probabilities averaged over mirrored and shifted views of a volume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer
from monai.utils import convert_to_dst_type
from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_logits
from monai_memeff.errors import InputError

CERTAIN = 1e-6
"""Mean probabilities nearer to 0 or 1 than this count as this far away, so that logits are finite."""


class ViewAveragingInferer(Inferer):
    """Run a network on mirrored and shifted views of a volume, and average the probabilities.

    A network of strides sees the volume through their grids, which a shift of one voxel moves. The views are the volume
    itself, its mirror image, and then pairs of both, shifted by up to ``shift`` voxels in a fixed order that spreads
    them; behind the volume's edge there is nothing (0).

    Args:
        inferer: runs one view; default :class:`monai.inferers.SimpleInferer`.
        views: number of views; 1 is the volume itself.
        shift: largest shift in voxels along each axis.
        mirror_axis: spatial axis from one side of the head to the other; None: no view is mirrored.
        level: mean probability above which a logit is positive. Where views disagree the mean is low, so a level
            below 0.5 suits several views.

    Raises:
        ValueError: more views than there are.

    Examples:
        >>> network = torch.nn.Conv3d(1, 1, 3, padding=1)
        >>> ViewAveragingInferer(views=4)(torch.rand(1, 1, 16, 16, 16), network).shape
        torch.Size([1, 1, 16, 16, 16])
    """

    @numbers_checked
    def __init__(
        self,
        inferer: Inferer | None = None,
        views: int = 16,
        shift: int = 2,
        mirror_axis: int | None = 0,
        level: float = 0.5,
    ) -> None:
        super().__init__()
        most = (1 if mirror_axis is None else 2) * (2 * shift + 1) ** 3
        if not 1 <= views <= most:
            raise ValueError(f"views must be 1 ... {most} for shifts of up to {shift} voxels, got {views}.")
        if not 0 < level < 1:
            raise ValueError(f"level is a probability between 0 and 1, got {level}.")
        if mirror_axis not in (None, 0, 1, 2):
            raise ValueError(f"mirror_axis must be None or a whole number in 0 ... 2, got {mirror_axis}.")
        self.inferer = SimpleInferer() if inferer is None else inferer
        self.views, self.shift, self.mirror_axis, self.level = views, shift, mirror_axis, level

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Infer.

        Args:
            inputs: (B, C, H, W, D).
            network: gives logits (B, K, H, W, D), each of a class of its own (sigmoid).
            args: passed on to the inferer.
            kwargs: passed on to the inferer.

        Returns:
            Logits (B, K, H, W, D), positive where the mean probability is above ``level``.

        Raises:
            InputError: the input has other dimensions, or the network's output another size.
        """
        if inputs.ndim != 5:
            raise InputError(f"views are of volumes (B, C, H, W, D), got the shape {tuple(inputs.shape)}")
        padded = nn.functional.pad(inputs.as_subclass(Tensor), [self.shift] * 6)
        total, count = None, torch.zeros(padded.shape[2:], device=inputs.device)
        for mirrored, place in self._places(inputs.shape[2:]):
            view = padded[place]
            view = view.flip(2 + self.mirror_axis) if mirrored and self.mirror_axis is not None else view
            logits = check_logits(self.inferer(view, network, *args, **kwargs), "the network")
            if logits.shape[2:] != inputs.shape[2:]:
                raise InputError(f"views of {tuple(inputs.shape[2:])} gave logits of {tuple(logits.shape[2:])} voxels")
            found = logits.float().sigmoid()
            found = found.flip(2 + self.mirror_axis) if mirrored and self.mirror_axis is not None else found
            if total is None:
                total = found.new_zeros((*found.shape[:2], *padded.shape[2:]))
                count = count.to(found.device)
            total[place] += found
            count[place] += 1
        assert total is not None
        inside = (..., *(slice(self.shift, self.shift + extent) for extent in inputs.shape[2:]))
        mean = total[inside] / count[inside]
        logits = torch.logit(mean, CERTAIN) - math.log(self.level / (1 - self.level))
        return convert_to_dst_type(logits, inputs, dtype=logits.dtype, device=logits.device)[0]

    def _places(self, extents: tuple[int, ...]) -> Iterator[tuple[bool, tuple[Any, ...]]]:
        """Whether a view is mirrored, and where it lies in the padded volume."""
        both = 1 if self.mirror_axis is None else 2
        offsets = spread(self.shift)
        for number in range(self.views):
            start = offsets[number // both]
            yield number % both == 1, (..., *(slice(a, a + n) for a, n in zip(start, extents, strict=True)))


def spread(shift: int) -> list[tuple[int, ...]]:
    """All offsets 0 ... 2 * shift of three axes, no shift first, in steps of the golden ratio through their list."""
    everything = list(itertools.product(range(2 * shift + 1), repeat=3))
    count = len(everything)
    step = next(n for n in range(max(1, round(0.618 * count)), 2 * count) if math.gcd(n, count) == 1)
    return [everything[(count // 2 + number * step) % count] for number in range(count)]

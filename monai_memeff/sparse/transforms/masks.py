"""Binary volumes as the skull transforms see them: channel first, whatever is not zero is bone."""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms.utils import generate_spatial_bounding_box
from torch import Tensor

from monai_memeff.checks import check_finite, check_mask, computable


def as_volume(img: Tensor | np.ndarray) -> Tensor:
    """A channel-first volume as a tensor.

    Raises:
        TypeError: it is not a tensor or array.
        ValueError: it is not (C, H, W, D), or holds NaN or infinity.
    """
    if not isinstance(img, Tensor | np.ndarray):
        raise TypeError(f"a skull must be a tensor or an array (C, H, W, D), got {type(img).__name__}; load it first.")
    if img.ndim != 4:
        raise ValueError(f"a skull must be channel first (C, H, W, D), got {tuple(img.shape)}; add or take an axis.")
    if 0 in img.shape:
        raise ValueError(f"a skull must have voxels, got {tuple(img.shape)}; crop it less.")
    volume = computable(img if isinstance(img, Tensor) else torch.as_tensor(img))
    check_finite(volume, "a skull transform")
    return volume


def foreground_mask(img: Tensor) -> Tensor:
    """(C, H, W, D) boolean without metadata, where the volume is not zero; InputError for NaN and negative numbers."""
    check_mask(img, "a skull transform")
    return img.as_subclass(Tensor) != 0


def morphology(name: str, mask: Tensor, steps: int) -> Tensor:
    """A binary operation of scipy.ndimage with six neighbors, channel by channel within the mask's bounding box.

    Args:
        name: ``"binary_erosion"`` or ``"binary_opening"``: what they leave lies inside the mask.
        mask: (C, H, W, D) boolean; outside the volume is empty.
        steps: iterations.

    Returns:
        (C, H, W, D) boolean on the mask's device.
    """
    from scipy import ndimage

    result = torch.zeros_like(mask)
    for channel, kept in zip(mask, result, strict=True):
        start, end = generate_spatial_bounding_box(channel[None], allow_smaller=True)
        box = tuple(slice(int(a), int(b)) for a, b in zip(start, end, strict=True))
        found = getattr(ndimage, name)(channel[box].cpu().numpy(), iterations=steps)
        kept[box] = torch.from_numpy(found).to(mask.device)
    return result

"""Activity rules: which voxels of a dense volume are worth computing."""

from __future__ import annotations

from torch import Tensor

from monai_memeff.arguments import check_number
from monai_memeff.checks import check_finite

ABSENT_LOGIT = 10.0
"""Size of the logit of voxels that were not computed: a probability below 5e-5."""


def active_voxels(image: Tensor, threshold: float | None = None, background: float = 0.0) -> Tensor:
    """Mark the active voxels of a batch of volumes.

    Args:
        image: (B, C, H, W, D).
        threshold: a voxel is active where any channel is larger than this value.
        background: used when ``threshold`` is None: a voxel is active where any channel differs from this value.

    Returns:
        (B, 1, H, W, D) boolean.

    Raises:
        ValueError: a value of the image, or the one it is compared with, is NaN or infinite.

    Examples:
        >>> active_voxels(torch.eye(4)[None, None, None]).sum()
        tensor(4)
    """
    check_number("background" if threshold is None else "threshold", background if threshold is None else threshold)
    check_finite(image, "active_voxels")
    active = image != background if threshold is None else image > threshold
    return active.any(dim=1, keepdim=True)

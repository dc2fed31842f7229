"""Pieces for MONAI's training engines: a batch of volumes becomes a batch of volumes and points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.occupancy.checks import plain_tensor
from monai_memeff.occupancy.sampling import PUBLISHED_BAND, checked_band, checked_fractions, sample_points


class PrepareBatchOccupancy(PrepareBatch):
    """Points for the network and their labels for the loss, for ``prepare_batch`` of MONAI's trainers.

    Takes the points of :class:`~monai_memeff.occupancy.RandOccupancyPointsd` if the batch has them, else draws them on
    the device from the label, so that a stock bundle needs no other transform. Predictions then are points and no
    volumes: metrics and post-processing of volumes belong to validation.

    Returns ``(image, (labels of points (B, N), label (B, 1, H, W, D)), (points (B, N, 3),), {})``, for
    :class:`~monai_memeff.occupancy.OccupancyNet` and :class:`~monai_memeff.occupancy.OccupancyLoss`.

    Args:
        image_key: key of the volume (B, C, H, W, D).
        label_key: key of the label (B, 1, H, W, D).
        points_key: key of the points (B, N, 3).
        occupancy_key: key of their labels (B, N).
        num_samples: Number of points to draw per volume, when the batch has none.
        sampling: see :class:`~monai_memeff.occupancy.RandOccupancyPoints`.
        band_width: see :class:`~monai_memeff.occupancy.RandOccupancyPoints`.
        ignore_index: see :class:`~monai_memeff.occupancy.RandOccupancyPoints`; the loss takes the same number.

    Raises:
        ValueError: as :class:`~monai_memeff.occupancy.RandOccupancyPoints`; when called, for a label that it refuses.

    Examples:
        >>> batch = dict.fromkeys(("image", "label"), torch.ones(2, 1, 16, 16, 16))
        >>> image, (values, label), (points,), _ = PrepareBatchOccupancy(num_samples=64)(batch)
        >>> values.shape, points.shape
        (torch.Size([2, 64]), torch.Size([2, 64, 3]))
    """

    @numbers_checked
    def __init__(
        self,
        image_key: str = "image",
        label_key: str = "label",
        points_key: str = "points",
        occupancy_key: str = "occupancy",
        num_samples: int = 2**14,
        sampling: str | Mapping[str, float] = "border",
        band_width: int = PUBLISHED_BAND,
        ignore_index: int | None = None,
    ) -> None:
        self.image_key, self.label_key = image_key, label_key
        self.points_key, self.occupancy_key = points_key, occupancy_key
        self.num_samples, self.band_width, self.ignore_index = num_samples, checked_band(band_width), ignore_index
        self.sampling = checked_fractions(sampling)

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor], dict[str, Any]]:
        """Move to the device, and draw points if there are none."""
        image, label = (
            plain_tensor(batchdata[key]).to(device=device, non_blocking=non_blocking)
            for key in (self.image_key, self.label_key)
        )
        if self.points_key in batchdata:
            points, values = (
                batchdata[key].to(device=device, non_blocking=non_blocking)
                for key in (self.points_key, self.occupancy_key)
            )
        else:
            points, values = draw_batch(label, self.num_samples, self.sampling, self.band_width, self.ignore_index)
        return image, (values, label), (points,), {}


def draw_batch(
    label: Tensor,
    num_samples: int,
    sampling: str | Mapping[str, float],
    band_width: int = PUBLISHED_BAND,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Points (B, N, 3) and labels (B, N) of a batch (B, 1, H, W, D), with torch's own random numbers on its device."""

    def draw(limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count,), device=label.device)

    drawn = [sample_points(one, num_samples, sampling, draw, band_width, ignore_index) for one in label]
    return torch.stack([points for points, _ in drawn]), torch.stack([values for _, values in drawn])

"""The skull-completion challenge's scores in millimeters: implant Dice, border Dice, 95 % Hausdorff distance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.metrics.utils import get_edge_surface_distance, prepare_spacing
from monai.transforms.utils import distance_transform_edt, generate_spatial_bounding_box

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_mask

__all__ = ["compute_border_dice", "compute_implant_dice", "compute_pooled_hausdorff", "implant_scores"]

Spacing = float | Sequence[float] | Sequence[Sequence[float]] | None


def _check_pair(y_pred: torch.Tensor, y: torch.Tensor) -> None:
    if y_pred.shape != y.shape or y_pred.ndim < 4:
        raise ValueError(
            f"prediction and truth must be batch-first masks of one shape (B, C, H, W[, D]),"
            f" got {tuple(y_pred.shape)} and {tuple(y.shape)}"
        )
    for mask in (y_pred, y):
        check_mask(mask, "an implant score")


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.as_tensor() if isinstance(x, MetaTensor) else x


def compute_implant_dice(y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Dice similarity of predicted and true implant.

    Args:
        y_pred: binary (B, C, H, W, D).
        y: binary (B, C, H, W, D).

    Returns:
        (B, C). Two empty implants score 1; one empty implant scores 0.

    Raises:
        ValueError: when the shapes differ, or a mask holds NaN, infinity or negative numbers.

    Examples:
        >>> compute_implant_dice(torch.ones(1, 1, 8, 8, 8), torch.ones(1, 1, 8, 8, 8))
        tensor([[1.]])
    """
    _check_pair(y_pred, y)
    pairs = zip(_plain(y_pred).flatten(0, 1), _plain(y).flatten(0, 1), strict=True)
    return torch.stack([_dice(pred != 0, truth != 0) for pred, truth in pairs]).view(y.shape[:2])


def _dice(pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Dice of two boolean volumes by counting: MONAI's ``compute_dice`` holds several copies of 32 bits per voxel."""
    total = pred.count_nonzero() + truth.count_nonzero()
    return torch.where(total > 0, 2 * (pred & truth).count_nonzero() / total, 1.0)


@numbers_checked
def compute_border_dice(
    y_pred: torch.Tensor, y: torch.Tensor, defective: torch.Tensor, spacing: Spacing = None, distance_mm: float = 10.0
) -> torch.Tensor:
    """Dice similarity of the implants where they meet the remaining skull (bDSC of the AutoImplant challenge).

    Only voxels whose center lies within ``distance_mm`` of the center of a voxel of the defective skull count, by the
    Euclidean distance transform. The challenge says 10 and leaves the unit to the voxel; here it is millimeters.

    Args:
        y_pred: binary (B, C, H, W, D), the predicted implant.
        y: binary (B, C, H, W, D), the true implant.
        defective: binary (B, C or 1, H, W, D), the skull without its implant.
        spacing: millimeters per voxel: a number, one per axis, or one such per item of the batch; None is 1 mm.
        distance_mm: width of the border.

    Returns:
        (B, C). Two implants empty there score 1, one empty there 0; without a skull nothing is near it.

    Raises:
        ValueError: when the shapes do not fit, or a mask holds NaN, infinity or negative numbers.

    Examples:
        >>> implant, skull = torch.zeros(2, 1, 1, 8, 8, 30)
        >>> implant[..., 10:], skull[..., :10] = 1, 1
        >>> guess = implant * (torch.arange(30) < 20)  # wrong far from the skull only
        >>> compute_border_dice(guess, implant, skull, distance_mm=10)
        tensor([[1.]])
    """
    _check_pair(y_pred, y)
    if (
        defective.shape[0] != y.shape[0]
        or defective.shape[2:] != y.shape[2:]
        or defective.shape[1] not in (1, y.shape[1])
    ):
        raise ValueError(
            f"the defective skull must have the shape of the implants {tuple(y.shape)} (or one channel),"
            f" got {tuple(defective.shape)}"
        )
    check_mask(defective, "an implant score")
    pred, truth, skull = (_plain(mask) != 0 for mask in (y_pred, y, defective))
    near = torch.zeros_like(pred)
    for b, sampling in enumerate(prepare_spacing(spacing, batch_size=y.shape[0], img_dim=y.ndim - 2)):
        for c in range(y.shape[1]):
            box = _box(pred[b, c] | truth[b, c], sampling, distance_mm)  # nothing else is counted
            near[b, c][box] = _near(skull[b, c % skull.shape[1]][box], sampling, distance_mm)
    return compute_implant_dice(pred & near, truth & near)


def _box(mask: torch.Tensor, sampling: float | Sequence[float] | None, margin_mm: float) -> tuple[slice, ...]:
    """The smallest box around a mask, grown by a margin; empty for an empty mask."""
    margin = [math.ceil(margin_mm / step) for step in _steps(mask, sampling)]
    return tuple(map(slice, *generate_spatial_bounding_box(mask[None], margin=margin, allow_smaller=True)))


def _near(skull: torch.Tensor, sampling: float | Sequence[float] | None, distance_mm: float) -> torch.Tensor:
    """Voxels whose center is within a distance of a skull voxel's; boolean, in the shape of ``skull``.

    Slab by slab, with what lies within the distance of a slab: the transform holds dozens of bytes per voxel.
    """
    near = torch.zeros_like(skull)
    reach = math.ceil(distance_mm / _steps(skull, sampling)[0])
    depth = max(2 * reach, 1)
    for start in range(0, len(skull), depth):
        low = max(start - reach, 0)
        part = skull[low : start + depth + reach]
        if part.any():
            distance = torch.as_tensor(distance_transform_edt(~part[None], sampling=sampling))[0]
            near[start : start + depth] = distance[start - low :][:depth].to(skull.device) <= distance_mm
    return near


def _steps(mask: torch.Tensor, sampling: float | Sequence[float] | None) -> list[float]:
    """Millimeters per voxel along every axis."""
    return torch.as_tensor(1.0 if sampling is None else sampling).expand(mask.ndim).tolist()


@numbers_checked
def compute_pooled_hausdorff(
    y_pred: torch.Tensor, y: torch.Tensor, spacing: Spacing = None, percentile: float = 95.0
) -> torch.Tensor:
    """A percentile of all surface distances, from prediction to truth and back, pooled before the percentile is taken.

    The challenge's HD95. MONAI's ``compute_hausdorff_distance`` takes the percentile of either direction and then the
    larger one, which differs. A surface voxel is one with a face on the outside (6-connectivity).

    Args:
        y_pred: binary (B, C, H, W, D).
        y: binary (B, C, H, W, D).
        spacing: millimeters per voxel: a number, one per axis, or one such per item of the batch; None is 1 mm.
        percentile: Percentile, from 0 to 100.

    Returns:
        (B, C) in millimeters. Two empty masks score 0; one empty mask scores infinity.

    Raises:
        ValueError: when the shapes differ, or a mask holds NaN, infinity or negative numbers.

    Examples:
        >>> truth = torch.zeros(1, 1, 8, 8, 8)
        >>> truth[..., 2:6] = 1
        >>> compute_pooled_hausdorff(truth.roll(1, -1), truth, spacing=0.5)
        tensor([[0.5000]])
    """
    _check_pair(y_pred, y)
    out = torch.zeros(y.shape[:2], dtype=torch.float32, device=y.device)
    spacings = prepare_spacing(spacing, batch_size=y.shape[0], img_dim=y.ndim - 2)
    for b in range(y.shape[0]):
        for c in range(y.shape[1]):
            out[b, c] = _pooled(_plain(y_pred)[b, c] != 0, _plain(y)[b, c] != 0, spacings[b], percentile)
    return out


def _pooled(pred: torch.Tensor, truth: torch.Tensor, spacing: Any, percentile: float) -> float:
    some_pred, some_truth = bool(pred.any()), bool(truth.any())
    if not (some_pred and some_truth):
        return float("inf") if some_pred or some_truth else 0.0
    with warnings.catch_warnings():  # MONAI 1.5 and later warn of their own use of an argument
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
        _, distances, _ = get_edge_surface_distance(pred, truth, spacing=spacing, symmetric=True)
    pooled = torch.cat([d.double().flatten() for d in distances])
    return _percentile(pooled, percentile)


def _percentile(values: torch.Tensor, percentile: float) -> float:
    """Linear interpolation between order statistics; ``torch.quantile`` refuses more than 16 M values."""
    ordered = values.sort().values
    place = (len(ordered) - 1) * percentile / 100.0
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def implant_scores(
    prediction: torch.Tensor, truth: torch.Tensor, defective: torch.Tensor, spacing: float | Sequence[float] = 1.0
) -> dict[str, float]:
    """All scores of one implant at once.

    Args:
        prediction: binary (H, W, D), the predicted implant.
        truth: binary (H, W, D), the true implant.
        defective: binary (H, W, D), the skull without its implant.
        spacing: millimeters per voxel, one number or one per axis.

    Returns:
        ``{"implant_dice", "border_dice", "hd95_mm", "skull_dice", "copy_dice"}``: the last two are the Dice of the
        completed skull, and of the defective skull handed back unchanged.

    Raises:
        ValueError: when the shapes differ, or a mask holds NaN, infinity or negative numbers.

    Examples:
        >>> skull = torch.ones(8, 8, 8)
        >>> implant = skull * (torch.arange(8) < 2)
        >>> implant_scores(implant, implant, skull - implant)["implant_dice"]
        1.0
    """
    masks = [torch.as_tensor(x)[None, None] for x in (prediction, truth, defective)]
    for mask in masks:
        _check_pair(mask, masks[1])
    pred, y, skull = (mask != 0 for mask in masks)
    complete = skull | y
    return {
        "implant_dice": float(compute_implant_dice(pred, y)),
        "border_dice": float(compute_border_dice(pred, y, skull, spacing)),
        "hd95_mm": float(compute_pooled_hausdorff(pred, y, spacing)),
        "skull_dice": float(compute_implant_dice(skull | pred, complete)),
        "copy_dice": float(compute_implant_dice(skull, complete)),
    }

"""Which points of a labeled volume to train on: uniform, near the border of a structure, balanced over classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from monai_memeff.arguments import check_count, check_number
from monai_memeff.checks import check_finite, check_labels, computable

Draw = Callable[[int, int], Tensor]
"""``draw(limit, count)``: ``count`` random integers below ``limit``, int64."""

KINDS = ("uniform", "border", "balanced")
PUBLISHED_BAND = 13


def checked_band(width: int) -> int:
    """The width of a border in voxels: ValueError unless it is odd."""
    check_count("band_width", width)
    if width % 2 == 0:
        raise ValueError(f"band_width must be odd, got {width}.")
    return width


def checked_fractions(sampling: str | Mapping[str, float]) -> dict[str, float]:
    """Fractions of the three kinds that add up to one; ``"border"`` alone is the paper's half border, half uniform.

    Raises:
        ValueError: an unknown kind, a negative fraction, or fractions that do not add up to one.
    """
    if isinstance(sampling, str):
        sampling = {"border": 0.5, "uniform": 0.5} if sampling == "border" else {sampling: 1.0}
    unknown = [kind for kind in sampling if kind not in KINDS]
    if unknown:
        raise ValueError(f"sampling must be of {', '.join(KINDS)}, got {unknown[0]!r}.")
    for kind, fraction in sampling.items():
        check_number(f"sampling[{kind!r}]", fraction, 0)
    fractions = {kind: float(fraction) for kind, fraction in sampling.items()}
    if not fractions or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"the fractions of sampling must be 0 or more and add up to 1, got {fractions}.")
    return fractions


def checked_label(label: Tensor) -> Tensor:
    """A label (1, H, W, D) or (H, W, D) as (H, W, D); ValueError for another shape, no voxels, NaN, or no integers."""
    if not isinstance(label, Tensor):
        raise TypeError(f"a label must be a tensor or an array, got {type(label).__name__}; load it first.")
    label = computable(label)
    volume = label[0] if label.ndim == 4 and len(label) == 1 else label
    if volume.ndim != 3 or volume.numel() == 0:
        raise ValueError(
            f"a label must be (1, H, W, D) with voxels in it, got {tuple(label.shape)}; argmax one-hot ones."
        )
    check_finite(volume, "a label")
    if volume.is_floating_point() and not bool((volume == volume.round()).all()):
        raise ValueError("a label must hold whole numbers, got fractions; resample labels with mode='nearest'.")
    return volume


def border_band(label: Tensor, width: int = PUBLISHED_BAND, ignore_index: int | None = None) -> Tensor:
    """Voxels near a change of the label: a non-zero gradient, dilated by ``width``^3.

    The published recipe takes a Sobel gradient and a max-pool of 13^3; both together are the voxels around which
    ``width + 2`` voxels along every axis do not all have the same label.

    Args:
        label: (H, W, D) whole numbers.
        width: odd, in voxels.
        ignore_index: label of voxels that are not part of any structure; they make no border and lie in none.

    Returns:
        (H, W, D) boolean.
    """
    reach = width // 2 + 1
    if ignore_index is None or not bool((ignored := label == ignore_index).any()):
        return _within(label, reach, torch.maximum) != _within(label, reach, torch.minimum)
    known = label[~ignored]
    if len(known) == 0:
        return torch.zeros_like(ignored)
    # an ignored voxel takes the value that changes no window with an annotated one in it
    largest = _within(label.masked_fill(ignored, known.min()), reach, torch.maximum)
    smallest = _within(label.masked_fill(ignored, known.max()), reach, torch.minimum)
    return (largest != smallest) & ~ignored


def _within(values: Tensor, reach: int, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The largest (or smallest) value up to ``reach`` voxels away along every axis, by windows that double.

    In the dtype of ``values``; max-pooling on a GPU would write a 64-bit index for every voxel too.
    """
    for axis, extent in enumerate(values.shape):
        beyond = min(reach, extent - 1)
        window, length = 2 * beyond + 1, 1
        ends = (values.narrow(axis, place, 1).repeat_interleave(beyond, axis) for place in (0, extent - 1))
        first, last = ends  # a window that reaches beyond the border holds these values anyway
        values = torch.cat((first, values, last), axis)
        while length < window:
            step = min(length, window - length)
            size = values.shape[axis] - step
            values = choose(values.narrow(axis, 0, size), values.narrow(axis, step, size))
            length += step
    return values


def sample_points(
    label: Tensor,
    num_samples: int,
    sampling: str | Mapping[str, float],
    draw: Draw,
    band_width: int = PUBLISHED_BAND,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw voxels of a label and say what is there.

    Args:
        label: (1, H, W, D) or (H, W, D) whole numbers.
        num_samples: Number of points N. All kinds draw with replacement, so a volume may be smaller; but the border
            band is taken whole if it has no more voxels than its fraction, and the rest is drawn uniformly.
        sampling: see :func:`checked_fractions`; balanced means as many points of every label present, background too.
        draw: source of random numbers.
        band_width: width of the border band in voxels, odd.
        ignore_index: label of voxels that are never drawn, but where a volume has no others: then all points lie in
            them, drawn uniformly, and have this label, for a loss that ignores it.

    Returns:
        Points (N, 3) float32 voxel indices, in random order if ``draw`` is, and their labels (N,) int64.

    Raises:
        ValueError: a label of another shape or kind, or negative values that are not ``ignore_index``.
    """
    volume = checked_label(label)
    fractions = checked_fractions(sampling)
    flat = volume.reshape(-1)
    usable = None if ignore_index is None else (flat != ignore_index).nonzero()[:, 0]
    check_labels(flat if usable is None else flat[usable], "the drawing of points")
    if usable is not None and len(usable) == 0:
        usable, ignore_index, fractions = None, None, {"uniform": 1.0}
    places = []
    if fractions.get("border"):
        near = border_band(volume, band_width, ignore_index).reshape(-1)
        places.append(_up_to(near.nonzero()[:, 0], round(num_samples * fractions["border"]), draw))
    if fractions.get("balanced"):
        places.append(_balanced(flat, round(num_samples * fractions["balanced"]), draw, ignore_index))
    missing = num_samples - sum(map(len, places))
    rest = draw(len(flat) if usable is None else len(usable), missing).to(flat.device)
    places.append(rest if usable is None else usable[rest])
    place = torch.cat(places)
    points = torch.stack(torch.unravel_index(place, tuple(volume.shape)), 1).float()
    return points, flat[place].long()


def _up_to(places: Tensor, num_samples: int, draw: Draw) -> Tensor:
    return places if len(places) <= num_samples else places[draw(len(places), num_samples).to(places.device)]


def _balanced(flat: Tensor, num_samples: int, draw: Draw, ignore_index: int | None) -> Tensor:
    classes = [value for value in flat.unique().tolist() if value != ignore_index]
    ends = [num_samples * (n + 1) // len(classes) for n in range(len(classes))]
    chosen = []
    for value, start, end in zip(classes, [0, *ends], ends, strict=False):
        where = (flat == value).nonzero()[:, 0]
        chosen.append(where[draw(len(where), end - start).to(where.device)])
    return torch.cat(chosen)

"""A CT or MRI and what is to be found in it, on one grid that a network trains on in minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.apps.skull.demo.io import is_ct
from monai_memeff.apps.systems.target import Target, body_threshold, make_target
from monai_memeff.errors import InputError
from monai_memeff.geometry import ras_affine, spacing

VOXELS = 400_000
"""Voxels of the grid, at most."""
STRIDE = 8  # the dense network halves the grid three times
LEAST = 16  # voxels along an axis of the image
MARGIN_MM = 5.0
BANDS, HIDDEN = 8, 2  # of eight bands of slices, the third and the seventh are hidden
IGNORED = 255
CT_WINDOWS = ((-1000.0, 1500.0), (-100.0, 150.0))
"""Whole range and soft tissue: the two channels of a CT."""


@dataclass(frozen=True)
class Scan:
    """One scan on the grid of the comparison.

    Attributes:
        image: float32 (1, C, H, W, D), about 0 to 1; axes run right, to the front and up.
        shown: float32 (H, W, D), 0 to 1, for pictures.
        target: uint8 (H, W, D), 0 is the background, then the classes in the order of ``names``.
        training: uint8 (1, 1, H, W, D), the target with 255 in the hidden bands.
        hidden: bool (H, W, D), voxels whose labels no training sees; quality is measured there.
        axis: axis along which the hidden bands lie.
        active: bool (H, W, D), voxels that the sparse network computes.
        names: names of the classes, the background left out.
        step_mm: millimeters per voxel along each axis.
        name: what to call the scan.
        task: a sentence: what is to be found.
        notes: plain sentences about what was found or changed.
    """

    image: Tensor
    shown: Tensor
    target: Tensor
    training: Tensor
    hidden: Tensor
    axis: int
    active: Tensor
    names: tuple[str, ...]
    step_mm: tuple[float, ...]
    name: str
    task: str
    notes: tuple[str, ...]

    @property
    def occupancy(self) -> float:
        """Fraction of active voxels."""
        return float(self.active.float().mean())

    @property
    def classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.names) + 1


def check_scan(image: MetaTensor, name: str) -> None:
    """Refuse what no system can train on.

    Args:
        image: (1, H, W, D).
        name: what to call it.

    Raises:
        InputError: fewer than 16 voxels along an axis, NaN or infinity, or one value everywhere.
    """
    shape = tuple(int(n) for n in image.shape[1:])
    if min(shape) < LEAST:
        raise InputError(
            f"{name} has {' x '.join(map(str, shape))} voxels, and at least {LEAST} along every axis are needed:"
            " give a larger volume"
        )
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise InputError(f"{name} holds {bad} voxels that are NaN or infinite, and none may be: replace them")
    if float(image.max()) <= float(image.min()):
        raise InputError(f"{name} has the value {float(image.min()):g} everywhere, and a scan is needed: give another")


def prepare_scan(
    image: MetaTensor,
    label: MetaTensor | None,
    name: str,
    threshold: float | None = None,
    voxels: int = VOXELS,
    names: Mapping[int, str] | None = None,
    notes: Sequence[str] = (),
) -> Scan:
    """Bring a scan onto the grid of the comparison: the box around the body, as fine as the voxels allow.

    Args:
        image: (1, H, W, D), CT in Hounsfield units or MRI in any.
        label: (1, H, W, D) whole numbers on the same grid; None: bone of a CT, foreground of an MRI.
        name: what to call the scan.
        threshold: what is to be found in an image without a label is above this value, see :func:`make_target`.
        voxels: most voxels of the grid.
        names: names of the label's values, where they are known.
        notes: sentences about the image for the report.

    Raises:
        InputError: what :func:`check_scan` and :func:`make_target` refuse.
    """
    from monai.transforms import Orientation

    check_scan(image, name)
    values = _upright(image, Orientation(axcodes="RAS", labels=None))
    ct, body = is_ct(values), body_threshold(values)
    target = make_target(values, None if label is None else _same_grid(label, image, name), threshold, names or {})
    steps = tuple(spacing(ras_affine(values)))
    box = _box((values[0] > body) | (target.labels > 0), steps)
    shape, step_mm = grid_shape([part.stop - part.start for part in box], steps, voxels)
    inside = (slice(None), *box)
    small = F.adaptive_avg_pool3d(values.as_tensor()[inside].float(), shape)[0]
    labels = _nearest(target.labels[box], shape) if target.cut is None else (small > target.cut).to(torch.uint8)
    if not labels.any():
        raise InputError(
            f"nothing of what is to be found in {name} is left on {' x '.join(map(str, shape))} voxels, and one voxel"
            " must be: give a smaller image around it"
        )
    scan = _assemble(small, labels, target, ct, body, step_mm, name)
    return replace(scan, notes=(*notes, *scan.notes))


def _upright(image: MetaTensor, turn: object) -> MetaTensor:
    turned: MetaTensor = turn(image)  # type: ignore[operator]
    return turned


def _same_grid(label: MetaTensor, image: MetaTensor, name: str) -> MetaTensor:
    """The label, turned as the image is, when it lies on the image's grid."""
    from monai.transforms import Orientation

    theirs, ours = tuple(label.shape[1:]), tuple(image.shape[1:])
    if theirs != ours:
        raise InputError(
            f"the label has {' x '.join(map(str, theirs))} voxels and {name} {' x '.join(map(str, ours))}: give a label"
            " on the image's grid"
        )
    apart = np.abs(np.asarray(ras_affine(label)) - np.asarray(ras_affine(image))).max()
    if apart > 0.1 * min(spacing(ras_affine(image))):
        raise InputError(
            f"the label's affine is not that of {name} (they differ by {apart:.3g} mm): resample the label"
        )
    return _upright(label, Orientation(axcodes="RAS", labels=None))


def _box(mask: Tensor, steps: tuple[float, ...]) -> tuple[slice, ...]:
    from monai.transforms.utils import generate_spatial_bounding_box

    margin = [round(MARGIN_MM / step) for step in steps]
    low, high = generate_spatial_bounding_box(mask[None], margin=margin, allow_smaller=True)
    box = [slice(int(a), int(b)) for a, b in zip(low, high, strict=True)]
    return tuple(
        part if part.stop - part.start >= LEAST else slice(0, extent)
        for part, extent in zip(box, mask.shape, strict=True)
    )


def grid_shape(extents: list[int], steps: tuple[float, ...], voxels: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The finest grid of at most so many voxels, in multiples of 8 and no finer than the image, nearly cubic.

    Args:
        extents: voxels of the image.
        steps: millimeters per voxel of the image.
        voxels: most voxels of the grid; 16 along every axis are always given.

    Returns:
        Shape, and millimeters per voxel along each axis.
    """
    size = [extent * step for extent, step in zip(extents, steps, strict=True)]

    def shape_at(step: float) -> tuple[int, ...]:
        cells = (mm / max(step, own) for mm, own in zip(size, steps, strict=True))
        return tuple(max(LEAST, int(n / STRIDE + 0.5) * STRIDE) for n in cells)

    low, high = min(steps), max(size)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if np.prod(shape_at(middle)) > voxels else (low, middle)
    shape = shape_at(min(steps)) if np.prod(shape_at(min(steps))) <= voxels else shape_at(high)
    return shape, tuple(mm / n for mm, n in zip(size, shape, strict=True))


def _nearest(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    return F.interpolate(labels[None, None].float(), shape, mode="nearest-exact")[0, 0].to(torch.uint8)


def _assemble(
    small: Tensor, labels: Tensor, target: Target, ct: bool, body: float, step_mm: tuple[float, ...], name: str
) -> Scan:
    axis, hidden = _hidden(labels)
    training = labels.masked_fill(hidden, IGNORED)[None, None]
    known = small[(training[0, 0] > 0) & ~hidden]
    lowest = float(known.kthvalue(max(1, round(0.005 * len(known)))).values) if len(known) else body
    cut = max(body, lowest if target.active is None else target.active)
    windows = CT_WINDOWS if ct else (_mr_window(small),)
    image = torch.stack([((small - a) / (b - a)).clamp(0, 1) for a, b in windows])[None]
    low, high = (-150.0, 1000.0) if ct else _mr_window(small)
    return Scan(
        image=image, shown=((small - low) / (high - low)).clamp(0, 1), target=labels, training=training,
        hidden=hidden, axis=axis, active=small > cut, names=target.names, step_mm=step_mm, name=name,
        task=target.task, notes=(*target.notes, *_notes(labels, hidden, small > cut, target.names)),
    )  # fmt: skip


def _mr_window(values: Tensor) -> tuple[float, float]:
    low, high = (float(v) for v in np.quantile(values.numpy(), (0.01, 0.995)))
    return (low, high) if high > low else (float(values.min()), float(values.max()))


def _hidden(labels: Tensor) -> tuple[int, Tensor]:
    """Bands that hold as many classes as any, and leave as many to learn from; slices along the last axis first."""
    best: tuple[int, int, Tensor] | None = None
    for axis in (2, 1, 0):
        number = torch.arange(labels.shape[axis]) * BANDS // labels.shape[axis]
        shape = [1, 1, 1]
        shape[axis] = -1
        hidden = (number % 4 == HIDDEN).reshape(shape).expand(labels.shape)
        both = len(set(labels[hidden].unique().tolist()) & set(labels[~hidden].unique().tolist()))
        if best is None or both > best[0]:
            best = (both, axis, hidden)
    assert best is not None
    return best[1], best[2].clone()


def _notes(labels: Tensor, hidden: Tensor, active: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    unseen, untaught = (
        [name for k, name in enumerate(names, 1) if not (labels[where] == k).any()] for where in (hidden, ~hidden)
    )
    if unseen:
        notes.append(f"not in the hidden slices, so not measured: {', '.join(unseen)}")
    if untaught:
        notes.append(f"not in the training slices (too small for the grid, or elsewhere): {', '.join(untaught)}")
    outside = int(((labels > 0) & ~active).sum())
    if outside:
        share = outside / max(1, int((labels > 0).sum()))
        notes.append(f"{share:.1%} of the labeled voxels are inactive: the sparse network calls them background")
    return tuple(notes)

"""What is to be found in a scan: the classes of a label, or what a threshold finds: bone, foreground."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.apps.skull.demo.io import BONE_HU, is_ct
from monai_memeff.errors import InputError

MOST_CLASSES = 64
CT_BODY = -400.0
FULL = 0.9
EASY = (
    "A threshold is an easy target: it shows that every system learns and what each costs, and says nothing about how"
    " well they segment what no threshold finds."
)


@dataclass(frozen=True)
class Target:
    """A target on the image's own grid.

    Attributes:
        labels: uint8 (H, W, D), classes 1, 2, ... in the order of ``names``.
        names: names of the classes, the background left out.
        task: sentences: what is to be found.
        cut: the threshold that makes the target, which is taken again on a coarser grid; None: a label.
        active: voxels above this value are active for the sparse network; None: it is read from the labels.
        notes: plain sentences for the report.
    """

    labels: Tensor
    names: tuple[str, ...]
    task: str
    cut: float | None = None
    active: float | None = None
    notes: tuple[str, ...] = ()


def body_threshold(image: Tensor) -> float:
    """The value above which a voxel belongs to the body: -400 HU in a CT, half of Otsu's threshold in an MRI."""
    return CT_BODY if is_ct(image) else _otsu(image, 0.5)


def _otsu(image: Tensor, part: float = 1.0) -> float:
    """Otsu's threshold, or a part of the way to it from the smallest value."""
    from skimage.filters import threshold_otsu

    low = float(image.min())
    return low + part * (float(threshold_otsu(image.numpy())) - low)


def make_target(
    image: MetaTensor, label: MetaTensor | None, threshold: float | None, names: Mapping[int, str]
) -> Target:
    """What is to be found.

    Args:
        image: (1, H, W, D).
        label: (1, H, W, D) on the same grid, or None.
        threshold: value above which a voxel of an image without a label is to be found; None: 300 Hounsfield units in
            a CT, Otsu's threshold in any other image.
        names: names of the label's values, where they are known.

    Raises:
        InputError: a label that is empty, has fractions or negative values, or more than 64 classes; no bone above the
            threshold, or nearly everything.
    """
    if label is not None:
        return _from_label(label, names)
    values = image.as_tensor()[0]
    if is_ct(values):
        threshold = BONE_HU if threshold is None else threshold
        return _thresholded(
            values, threshold, "bone", f"Bone: voxels above {threshold:g} HU (the image is a CT without a label).",
            threshold - 200,
        )  # fmt: skip
    cut, chosen = (_otsu(values), ", Otsu's threshold") if threshold is None else (threshold, "")
    task = f"Foreground: voxels above {cut:.4g}{chosen} (the image is no CT in Hounsfield units, no label)."
    return _thresholded(values, cut, "foreground", task, float(values.min()) + 0.5 * (cut - float(values.min())))


def _thresholded(values: Tensor, cut: float, name: str, task: str, active: float) -> Target:
    mask = values > cut
    share = float(mask.float().mean())
    if not 0 < share < FULL:
        raise InputError(
            f"{share:.0%} of the voxels lie above {cut:g}, and more than 0 % and less than {FULL:.0%} must:"
            " change --threshold, or give a --label"
        )
    return Target(mask.to(torch.uint8), (name,), f"{task} {EASY}", cut, active)


def _from_label(label: MetaTensor, names: Mapping[int, str]) -> Target:
    values = label.as_tensor()[0]
    found = values.unique()
    if not torch.isfinite(found).all() or (found != found.round()).any() or float(found.min()) < 0:
        raise InputError(
            f"the label holds {float(found.min()):g} to {float(found.max()):g} with fractions, negative numbers or NaN,"
            " and whole numbers from 0 on are needed: is it the image?"
        )
    classes = [int(value) for value in found if value > 0]
    if not classes:
        raise InputError("the label is empty, and at least one voxel must be above 0: give another label")
    if len(classes) > MOST_CLASSES:
        raise InputError(f"the label has {len(classes)} classes, and at most {MOST_CLASSES} are compared: merge some")
    labels = torch.bucketize(values, torch.tensor([c - 0.5 for c in classes])).to(torch.uint8)
    called = tuple(names.get(c, f"label {c}") for c in classes)
    return Target(labels, called, f"The label's classes: {len(classes)}.")

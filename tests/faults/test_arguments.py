"""Numbers that are none, fractions and axes that volumes lack, as arguments: refused by name, since NaN passes `<`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from monai_memeff.apps.skull import RandSkullVariation
from monai_memeff.arguments import check_axis, check_count
from monai_memeff.clstm import NiftiSlabs, SlabInferer, SliceSequence
from monai_memeff.occupancy import OccupancyLoss, OccupancyNet, OctreeInferer, SampledDiceMetric
from monai_memeff.sparse import (
    SparseCompletionLoss,
    SparseCompletionNet,
    SparseConv3d,
    SparseConvTranspose3d,
    SparseCoordinates,
    SparseMaxPool3d,
    SparseUNet,
    ThresholdAtSpacing,
    active_voxels,
)

NAN, INF = float("nan"), float("inf")


def unet(**kwargs: Any) -> SparseUNet:
    return SparseUNet(3, 1, 2, (2, 4), (2,), **kwargs)


def layer(**kwargs: Any) -> SparseConv3d:
    return SparseConv3d(1, 1, **kwargs)


def transposed(**kwargs: Any) -> SparseConvTranspose3d:
    return SparseConvTranspose3d(1, 1, **kwargs)


def resampled(pixdim: float = 1.0, threshold: float = 1.0) -> ThresholdAtSpacing:
    return ThresholdAtSpacing(pixdim, threshold)


def completion(**kwargs: Any) -> SparseCompletionNet:
    return SparseCompletionNet((2,) * 7, **kwargs)


def slabs(**kwargs: Any) -> NiftiSlabs:
    return NiftiSlabs("not read", **kwargs)


NUMBERS = (NAN, INF)
COUNTS = (NAN, 1.5, 0, -1)
CASES: list[tuple[Callable[..., Any], str, tuple[float, ...]]] = [
    (unet, "threshold", NUMBERS),
    (unet, "background", NUMBERS),
    (SparseCoordinates, "threshold", NUMBERS),
    (SparseCoordinates, "background", NUMBERS),
    (SparseCoordinates, "constant", NUMBERS),
    (resampled, "pixdim", NUMBERS),
    (resampled, "threshold", NUMBERS),
    (RandSkullVariation, "rotation", (*NUMBERS, -1)),
    (RandSkullVariation, "scale", (*NUMBERS, -1)),
    (RandSkullVariation, "shear", (*NUMBERS, -1)),
    (RandSkullVariation, "bend", (*NUMBERS, -1)),
    (RandSkullVariation, "cut", (*NUMBERS, -1)),
    (OccupancyLoss, "coarse_weight", (*NUMBERS, -1)),
    (SparseCompletionLoss, "gamma", (*NUMBERS, -1)),
    (SparseCompletionLoss, "ignore_index", (NAN, 0.5, 0)),
    (completion, "ignore_index", (NAN, 0.5, 0)),
    (completion, "max_voxels", (NAN, 100.5, 63)),
    (OctreeInferer, "points_per_pass", COUNTS),
    (OccupancyNet, "points_per_pass", COUNTS),
    (OccupancyNet, "downscale", COUNTS),
    (SampledDiceMetric, "num_samples", COUNTS),
    (SampledDiceMetric, "classes", COUNTS),
    (SlabInferer, "slab", COUNTS),
    (SlabInferer, "prefetch", (NAN, 1.5, -1)),
    (slabs, "slab", COUNTS),
    (slabs, "axis", (NAN, 1.0, 3, -4)),
    (SliceSequence, "axis", (NAN, 1.0, 3, -4)),
    (SliceSequence, "slab", (*NUMBERS, 0)),
    (SliceSequence, "overlap", (*NUMBERS, -1)),
    (SliceSequence, "spacing", (*NUMBERS, 0)),
    (layer, "kernel_size", COUNTS),
    (layer, "stride", COUNTS),
    (layer, "dilation", COUNTS),
    (transposed, "kernel_size", COUNTS),
    (transposed, "stride", COUNTS),
    (SparseMaxPool3d, "kernel_size", COUNTS),
    (SparseMaxPool3d, "stride", COUNTS),
]


@pytest.mark.parametrize(("build", "name", "values"), CASES, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_number_that_cannot_be_meant_is_refused(
    build: Callable[..., Any], name: str, values: tuple[float, ...]
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name.split("_")[0]):
            build(**{name: value})


def test_what_inactive_voxels_are_is_finite() -> None:
    with pytest.raises(ValueError, match="inactive_logits must be a sequence of finite numbers"):
        unet(inactive_logits=(NAN, 0.0))
    with pytest.raises(ValueError, match="threshold must be finite, got nan"):
        active_voxels(torch.ones(1, 1, 2, 2, 2), NAN)


def test_whole_numbers_of_numpy_are_taken() -> None:
    check_count("slab", np.int64(3))
    check_axis(np.int64(-1))
    assert completion(max_voxels=np.int64(64), ignore_index=np.int64(-1)).max_voxels == 64
    assert layer(stride=np.int64(2)).stride == (2, 2, 2)
